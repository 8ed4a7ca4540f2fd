"""The families of models whose training is tested, all weights and LoRA, packed and padded."""

from typing import NamedTuple


class Family(NamedTuple):
    """Models of one model_type of transformers."""

    names: str
    """as people know them"""
    note: str = ""
    """what is particular about their training here"""


BALANCE = (
    "the loss that balances the experts is left out, as in transformers by default; a config that "
    "asks for it is an error"
)
FAMILIES = {
    "gpt2": Family("GPT-2"),
    "bloom": Family("BLOOM, BLOOMZ"),
    "llama": Family("Llama, Llama-3-Swallow, llm-jp-3, llm-jp-4 (8B), Sarashina 2, SmolLM 2"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen 2, Qwen 2.5, TinySwallow"),
    "qwen3": Family("Qwen 3, Qwen3-Swallow"),
    "gemma": Family("Gemma"),
    "gemma2": Family(
        "Gemma 2, Gemma-2-Llama-Swallow",
        "attention by transformers' own code: its scores are capped",
    ),
    "gemma3_text": Family("Gemma 3 (text)"),
    "phi3": Family("Phi-3, Phi-4-mini"),
    "smollm3": Family("SmolLM 3"),
    "olmo2": Family("OLMo 2"),
    "granite": Family("Granite"),
    "cohere": Family("Command R, Aya"),
    "cohere2": Family("Command R7B, Command A"),
    "gpt_neox": Family("GPT-NeoX, Pythia, OpenCALM, rinna's 3.6B"),
    "stablelm": Family("Stable LM"),
    "qwen3_moe": Family("Qwen 3 MoE", BALANCE),
    "olmoe": Family("OLMoE", BALANCE),
    "mixtral": Family("Mixtral", BALANCE),
}
