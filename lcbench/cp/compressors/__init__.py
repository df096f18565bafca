"""How a rank of APB chooses which keys of its block it passes on: one file per method, found by conf/compressor/<name>.yaml."""
