"""What src/publish.py sends, by kind of run, and how tests call it."""

from hub_server import REPO
from run_folders import S

import publish

LORA = ("publish.base_model=elith/tiny-base",)
MERGED = (*LORA, "publish.merged=true")
BOTH = (*MERGED, "publish.adapter=true")
ALWAYS = {"README.md", "manifest.json", "recipe.yaml", "samples.md", "metrics.jsonl", "loss.png"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CONFIGS = {"config.json", "generation_config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
WHOLE = {*CONFIGS, "model.safetensors"}
KINDS = {
    "full": ("full", (), WHOLE),
    "sharded": (
        "sharded",
        (),
        {*CONFIGS, "model.safetensors.index.json", "model-*-of-*.safetensors"},
    ),
    "adapter": ("lora", LORA, ADAPTER),
    "merged": ("lora", MERGED, WHOLE),
    "both": ("lora", BOTH, {*WHOLE, *(f"adapter/{name}" for name in ADAPTER)}),
}


def published(call, run, *arguments: str):
    done = call(publish, run, "--unasked", *arguments)
    assert done.code == 0, done.err
    return done


def names(hub, subfolder: str = S) -> set[str]:
    return {
        path.removeprefix(f"{subfolder}/")
        for path in hub.tree(REPO)
        if path.startswith(f"{subfolder}/")
    }
