"""The llm: a causal language model of the DeepSeek-V3 architecture, on texts."""
