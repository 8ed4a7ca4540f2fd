"""Small tokenizers and models built in memory: one of each kind that people fine-tune."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXTS = [
    "### Question: What is the capital of Japan?\n### Answer: Tokyo",
    "### 指示:\n日本の首都はどこですか？\n\n### 回答:\n東京です。",
    "User: Hello there, how are you?\nAssistant: I am fine, thank you very much!\n",
    "The quick brown fox jumps over the lazy dog. 1 + 2 = 3, 10 x 10 = 100.",
]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, no BOS in front, one special token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def metaspace() -> PreTrainedTokenizerFast:
    """T5's and llm-jp's kind: Unigram over metaspace with byte fallback."""
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((f"<0x{byte:02X}>", -9.0) for byte in range(256)),
    ]
    letters = sorted(
        {letter for text in TEXTS for letter in text.replace(" ", "▁") if letter != "\n"}
    )
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split() if len(word) > 1})
    pieces += [(letter, -6.0) for letter in letters] + [
        (word, -5.0) for word in words if word not in letters
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Metaspace(prepend_scheme="first", split=False),
            decoders.Fuse(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE with byte fallback, a prepended space, BOS in front of every text."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    trained.train_from_iterator([text.replace("\n", "") for text in TEXTS], trainer)
    settings = json.loads(trained.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    settings["model"] |= {"byte_fallback": True, "fuse_unk": True}

    backend = Tokenizer.from_str(json.dumps(settings))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "byte_fallback": byte_fallback,
}

CHAT_TOKENS = [
    *("<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]

# What chat templates in the wild do, each as short as it can be.
CHAT_TEMPLATES = {
    # Qwen 2's kind: the words as they are, a line feed after the end mark.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # SmolLM 3's kind: marks what is generated, but leaves out the end mark.
    "chatml_generation": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Llama 3's kind: trims every message, ends a turn with a token that is not EOS.
    "llama_3": (
        "{{ '<|begin_of_text|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{{ message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
    # Mistral's kind: trims the assistant only, ends a turn with EOS, refuses roles that do not
    # alternate.
    "mistral": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate "
        "user/assistant/user/assistant/...') }}"
        "{% endif %}"
        "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + message.content | trim + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # Qwen 3's kind: an (empty) thought before the last answer, which later turns no longer show.
    "thinking": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Vicuna's kind: names in plain words, EOS after a response, a space behind the last name.
    "vicuna": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ message.role | upper + ': ' + message.content }}"
        "{{ eos_token if message.role == 'assistant' else '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ),
    # Older models' kind: no special token at all.
    "lines": (
        "{% for message in messages %}"
        "{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}


def chat_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of TOKENIZERS with one of CHAT_TEMPLATES and the special tokens of all."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens(CHAT_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    return tokenizer


CONFIGS = {
    "gpt2": {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "bloom": {
        "n_layer": 2,
        "hidden_size": 32,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}


def model_of(
    kind: str, vocab_size: int = 512, seed: int = 0, width: int = 32, **more: object
) -> PreTrainedModel:
    """A random model of an architecture the recipes use, or of one that needs `more` settings.

    Its weights are large enough that tokens matter to each other.
    """
    torch.manual_seed(seed)
    end = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    fields = {
        **CONFIGS.get(kind, CONFIGS["llama"]),
        "n_embd" if kind == "gpt2" else "hidden_size": width,
        **more,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=vocab_size, **end, **fields)
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2 * (32 / width) ** 0.5)
    return model.eval()


def write_base(folder: Path, kind: str, **more: object) -> Path:
    """A random base model of an architecture, with `more` settings, as a local folder."""
    tokenizer = byte_level()
    model_of(kind, vocab_size=len(tokenizer), **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
