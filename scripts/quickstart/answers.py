"""The answers of a checkpoint to a few problems, by Hugging Face's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def work_on(model_dir: Path, rows: list[dict[str, Any]], max_new_tokens: int = 48) -> list[str]:
    """Greedy responses to each row's `prompt`, as text without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    texts = [
        tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False)
        for r in rows
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    prompt_length = inputs["input_ids"].shape[1]
    return [
        t.strip()
        for t in tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    ]
