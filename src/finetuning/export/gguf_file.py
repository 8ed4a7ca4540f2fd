"""Full weights -> one GGUF file with tokenizer, chat template, end tokens and settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuning.export.architectures import (
    Architecture,
    architecture_of,
    context_length,
    write_common_settings,
)
from finetuning.export.vocabulary import write_vocabulary
from finetuning.recipe.sections import Generation

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerFast

TYPES = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class Contents:
    """What goes into a file beside the weights."""

    name: str
    tokenizer: "PreTrainedTokenizerFast"
    chat_template: str | None
    """Jinja; None where there is none that asks as was trained"""
    ends: list[int]
    """ids of the tokens that end a response"""
    generation: Generation
    license: str | None


def write_gguf(weights: Path, contents: Contents, kind: str, target: Path) -> None:
    """Writes the full weights of a folder, stored as one of TYPES, with their contents.

    Raises UserError for an architecture or tokenizer that is not exported here.
    """
    from gguf import GGUFWriter, LlamaFileType
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
    architecture = architecture_of(config)
    unfinished = target.with_name(f".{target.name}.tmp")
    # Weights wait on disk, not in memory, until the file's head is complete.
    writer = GGUFWriter(unfinished, architecture.name, use_temp_file=True)
    writer.add_file_type(
        {
            "f32": LlamaFileType.ALL_F32,
            "f16": LlamaFileType.MOSTLY_F16,
            "q8_0": LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    write_common_settings(writer, config)
    architecture.write_settings(writer, config)
    write_contents(writer, contents, config.vocab_size)
    write_sampling(writer, contents.generation, context_length(config))
    write_weights(writer, weights, architecture, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(target)


def write_contents(writer: "GGUFWriter", contents: Contents, size: int) -> None:
    writer.add_type("model")
    writer.add_name(contents.name)
    if contents.license:
        writer.add_license(contents.license)
    write_vocabulary(writer, contents.tokenizer, contents.ends, size)
    if contents.chat_template:
        writer.add_chat_template(contents.chat_template)


def write_sampling(writer: "GGUFWriter", generation: Generation, positions: int) -> None:
    """The recipe's settings as the defaults of who loads the file; greedy unless it samples."""
    given = generation.model_dump(exclude_unset=True)
    if not given.get("do_sample"):
        writer.add_sampling_temp(0.0)
    elif (temperature := given.get("temperature")) is not None:
        writer.add_sampling_temp(temperature)
    if (penalty := given.get("repetition_penalty")) is not None:
        writer.add_sampling_penalty_repeat(penalty)
        writer.add_sampling_penalty_last_n(positions)  # all tokens, as in transformers
    for name in ("top_k", "top_p", "min_p"):
        if (value := given.get(name)) is not None:
            getattr(writer, f"add_sampling_{name}")(value)


def write_weights(
    writer: "GGUFWriter", folder: Path, architecture: Architecture, config: Any, kind: str
) -> None:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map, quantize

    (arch,) = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in weights_of(folder):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        new = new or names.get_name(name, (".weight", ".bias"))
        assert new is not None, f"{architecture.name} has no name for {name}"
        changed = architecture.change(name, weight.float(), config).contiguous().numpy()
        stored = stored_as(kind, new, changed.shape)
        writer.add_tensor(new, quantize(changed, stored), raw_dtype=stored)
    for name, tensor in architecture.more(config).items():
        writer.add_tensor(name, tensor.float().numpy())


def weights_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of every shard, one at a time in memory."""
    from safetensors import safe_open

    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                yield name, shard.get_tensor(name)


def stored_as(kind: str, name: str, shape: tuple[int, ...]) -> "GGMLQuantizationType":
    """Vectors and positions in full; q8_0 goes in blocks of 32 numbers of a row."""
    from gguf import GGMLQuantizationType

    if kind == "f32" or len(shape) == 1 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32 == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16
