"""Writers of models, stores and adapters."""

# The types of GGUF's tensors that are written, from the widest to the narrowest. Those with K need the package libgguf.
GGUF_TYPES = ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
GGUF_FLOATS = GGUF_TYPES[:3]
