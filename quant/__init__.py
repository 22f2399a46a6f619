"""Numbers in few bits: GGML block formats with their NumPy oracles, our quantizer, packing into kernel tiles."""
