"""In-context learning of Transformer, Mamba and MambaFormer at equal size (arXiv 2402.04248). Command: `run`."""
