"""How sparse attention chooses its mask from q and k: one file per method, found by conf/selector/<name>.yaml."""
