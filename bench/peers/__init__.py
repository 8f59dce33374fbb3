"""fq beside other programs that run the same GGUF files: ``python -m bench.peers --help``."""
