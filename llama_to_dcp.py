"""Llama weights of Hugging Face or Meta into a checkpoint folder that training starts from.

python llama_to_dcp.py --input_dir Llama-3.1-8B --output_dir outputs/Llama-3.1-8B
python llama_to_dcp.py --input_dir Llama-3.1-8B --output_dir outputs/Llama-3.1-8B-text --vocab keep --verify

One tensor is in memory at a time. Exit status: 0 done, 2 something is to be mended; nothing is left behind then.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan_bio import bridge, checkpoint, command_line, convert, distributed, weight_files
from torchtitan_bio.models import llama3
from torchtitan_bio.science import agreement

UNDERSTOOD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Weights to convert, under our names and in our order of rows."""

    kind: str
    architecture: llama3.Architecture
    entries: dict[str, weight_files.Entry]
    read: Callable[[str], torch.Tensor]
    config: dict
    """config.json or params.json, as it is."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.Parser(description="Llama weights of Hugging Face or Meta -> a checkpoint folder.")
    parser.add_argument("--input_dir", type=Path, required=True, help="config.json + safetensors, or params.json + *.pth")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--vocab",
        choices=["keep", "new"],
        default="new",
        help="new leaves embedding and output out, for models with another vocabulary (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=bridge.DTYPES, help="type to store (default: the input's)")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it with the input")
    return parser.parse_args(arguments)


def main(asked: argparse.Namespace):
    bridge.refuse_existing(asked.output_dir, asked.input_dir)
    source = open_source(asked.input_dir)
    if asked.verify and is_for_transformers(source, asked):
        agreement.need_transformers()
    names = [name for name in source.entries if asked.vocab == "keep" or name not in convert.OF_THE_VOCABULARY]
    world = distributed.start()
    write(source, names, asked, world)
    if asked.verify:
        try:
            verify(source, names, asked, world)
        except BaseException:  # KeyboardInterrupt too: who asks for the check shall find nothing that has not passed it
            shutil.rmtree(asked.output_dir)
            raise
    distributed.stop()
    print("\n".join(["", "a TOML that starts from it says", "", *toml_of(source.architecture, asked)]))


def open_source(folder: Path) -> Source:
    """What the folder holds, by its files; every tensor that a Llama needs is there in the right shape, or ValueError."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    is_meta, is_hf = ((folder / name).exists() for name in ("params.json", "config.json"))
    if is_meta and is_hf:  # which of them are there for other weights than these?
        is_hf = any(folder.glob("*.safetensors"))
    if is_hf:
        source = open_hugging_face(folder)
    elif is_meta:
        source = open_meta(folder)
    else:
        raise ValueError(
            f"{folder} has neither config.json (Hugging Face) nor params.json (Meta); it holds "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:10]) or 'nothing'}"
        )
    numbers = ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(source.architecture).items())
    print(f"{folder}: Llama weights of {source.kind}\n{numbers}")
    return source


def open_hugging_face(folder: Path) -> Source:
    config = bridge.read_json(folder / "config.json")
    architecture = llama3.Architecture(**convert.numbers_of_hf(config))
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        raise ValueError(
            f"{folder} holds its weights as .bin, which are pickles and are not opened; where you trust them, let transformers "
            "write safetensors: LlamaForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
        )
    files = weight_files.open_safetensors(folder)
    wanted = {convert.hf_name(name): shape for name, shape in bridge.shapes_of("llama3", architecture).items()}
    found = {name: entry for name, entry in files.tensors.items() if not convert.HF_IGNORED.fullmatch(name)}
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if architecture.tie_embeddings and head and embedding:
        if head.dtype != embedding.dtype or not torch.equal(
            files.read("lm_head.weight"), files.read("model.embed_tokens.weight")
        ):
            raise ValueError(
                f"{folder / 'config.json'} says tie_word_embeddings, but lm_head differs from the embedding; "
                "say false there if both are meant"
            )
        del found["lm_head.weight"]
    check(folder, found, wanted)

    def read(name: str) -> torch.Tensor:
        return convert.from_hf(name, files.read(convert.hf_name(name)), architecture.head_dim)

    return Source(
        kind="Hugging Face",
        architecture=architecture,
        entries={name: found[convert.hf_name(name)] for name in bridge.shapes_of("llama3", architecture)},
        read=read,
        config=config,
    )


def open_meta(folder: Path) -> Source:
    config = bridge.read_json(folder / "params.json")
    shards = weight_files.open_meta(folder, lambda name: None)
    shapes = {name: entry.pieces[0].shape for name, entry in shards.tensors.items()}  # of a shard, which tells how it was cut
    files = weight_files.open_meta(folder, lambda name: convert.meta_split_dim(name, shapes[name], config.get("dim")))
    embedding, query = (files.tensors.get(name) for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight"))
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{folder} holds no tok_embeddings.weight (words, dim); these are not Meta's Llama weights")
    architecture = llama3.Architecture(**convert.numbers_of_params(config, embedding.shape[0]))
    if query and 0 < query.shape[0] < architecture.dim and architecture.dim % query.shape[0] == 0:
        num_shards, of = len(query.pieces), len(query.pieces) * architecture.dim // query.shape[0]
        raise ValueError(
            f"{folder} holds {num_shards} of {of} shards by params.json's dim={architecture.dim}; download the rest"
        )
    wanted = bridge.shapes_of("llama3", architecture)
    check(folder, files.tensors, wanted)
    entries = {name: files.tensors[name] for name in wanted}
    return Source(kind="Meta", architecture=architecture, entries=entries, read=files.read, config=config)


def check(folder: Path, found: dict[str, weight_files.Entry], wanted: dict[str, tuple[int, ...]]):
    """ValueError unless these are the tensors that are wanted, in a type that was trained in."""
    bridge.check_shapes(folder, {name: entry.shape for name, entry in found.items()}, wanted)
    for name, entry in found.items():
        if entry.dtype not in UNDERSTOOD:
            raise ValueError(f"{folder}: {name} is of {entry.dtype}; take weights that are not quantized")


def write(source: Source, names: list[str], asked, world):
    layout = {
        f"model.{name}": torch.empty(source.entries[name].shape, dtype=stored_dtype(source, name, asked), device="meta")
        for name in names
    }
    size = sum(tensor.nbytes for tensor in layout.values())
    flavor, overrides = nearest_flavor(source.architecture, asked.vocab)
    documents = {
        "model.json": {
            "family": "llama3",
            "flavor": "custom" if overrides else flavor,
            "architecture": dataclasses.asdict(source.architecture),
        },
        "converted.json": {"from": source.kind, "vocab": asked.vocab, "config": source.config},
    }
    started = time.monotonic()
    with bridge.progress(size, "converting") as advance:

        def read(stored: str) -> torch.Tensor:
            tensor = source.read(stored.removeprefix("model.")).to(layout[stored].dtype)
            advance(tensor.nbytes)
            return tensor

        checkpoint.write_weights(asked.output_dir, layout, documents, read=read, world=world)
    seconds = time.monotonic() - started
    print(f"{asked.output_dir}: {len(names)} tensors, {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")


def stored_dtype(source: Source, name: str, asked) -> torch.dtype:
    return bridge.DTYPES[asked.dtype] if asked.dtype else source.entries[name].dtype


def verify(source: Source, names: list[str], asked, world):
    """Read the folder again: the input's numbers to the last bit, and where transformers can tell, its logits too."""
    result = checkpoint.open_weights(asked.output_dir, world=world)
    for name in names:
        wanted = source.read(name).to(stored_dtype(source, name, asked))
        if not torch.equal(result.read(name), wanted):
            raise ValueError(f"{asked.output_dir}: {name} is not what {asked.input_dir} holds; try again")
    print(f"verified: {len(names)} tensors are the input's to the last bit" + (f", as {asked.dtype}" if asked.dtype else ""))
    if is_for_transformers(source, asked):
        here = agreement.ours("llama3", source.architecture, result.read)
        lines = agreement.check(here, agreement.of_transformers(asked.input_dir), source.architecture.vocab_size)
        print(*(f"verified against transformers: {line}" for line in lines), sep="\n")


def is_for_transformers(source: Source, asked) -> bool:
    """Whether transformers can make logits of the very numbers that are stored."""
    return asked.vocab == "keep" and source.kind == "Hugging Face" and not asked.dtype


def nearest_flavor(architecture, vocab: str) -> tuple[str, dict]:
    """The flavor that says most of an architecture, and the overrides that say the rest."""
    differing = {}
    for flavor, numbers in llama3.FLAVORS.items():
        differing[flavor] = {
            field.name: getattr(architecture, field.name)
            for field in dataclasses.fields(architecture)
            if getattr(architecture, field.name) != getattr(numbers, field.name)
            and (vocab == "keep" or field.name not in ("vocab_size", "tie_embeddings"))
        }
    flavor = min(differing, key=lambda name: len(differing[name]))
    return flavor, differing[flavor]


def toml_of(architecture, asked) -> list[str]:
    flavor, overrides = nearest_flavor(architecture, asked.vocab)
    lines = ["[model]", f'flavor = "{flavor}"']
    if overrides:
        lines += ["", "[model.overrides]", *(f"{key} = {json.dumps(value)}" for key, value in overrides.items())]
    lines += ["", "[checkpoint]", f"init_from = {json.dumps(str(asked.output_dir), ensure_ascii=False)}"]
    if asked.vocab == "new":
        lines.append(f"init_allow_missing = {json.dumps(list(convert.OF_THE_VOCABULARY))}")
    return lines


if __name__ == "__main__":
    ASKED = parse(sys.argv[1:])
    sys.exit(bridge.run(lambda: main(ASKED)))
