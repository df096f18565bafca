"""What a cell's q, k and v are: one file per way to make them, found by conf/inputs/<name>.yaml."""
