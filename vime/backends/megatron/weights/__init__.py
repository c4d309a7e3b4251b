"""Weights between Hugging Face folders and Megatron's shards: files, cutting, loading, export."""
