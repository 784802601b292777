"""A checkpoint into a folder that transformers loads, or Meta's consolidated.00.pth, with a card; and onto the Hub.

python dcp_to_llama.py --input_dir outputs/primate_8B/checkpoint/step-00050000 --output_dir primate-8B --verify
python dcp_to_llama.py --input_dir ... --output_dir primate-8B --hf_repo_name USER/NAME --push_to_hub --dry_run

Of the input, ours or of torchtitan's kin, the model's tensors alone are loaded, one at a time. The output folder appears when
it is whole; the same command again takes one that is there, so a push that failed goes on, and a card that was filled in
meanwhile goes with it. Exit status: 0 done, 2 something is to be mended, and then what was there before is as it was.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

import torchtitan_bio
from torchtitan_bio import bridge, checkpoint, command_line, config_loader, convert, distributed, hub, models, weight_files
from torchtitan_bio.science import agreement, card

MANIFEST, CARD = "manifest.json", "README.md"
WEIGHTS_OF_OTHERS = ("config.json", "params.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What is to be written."""

    weights: checkpoint.Weights
    model_json: dict
    architecture: object
    dtype: torch.dtype
    formats: tuple[str, ...]

    def read(self, name: str) -> torch.Tensor:
        """A parameter of ours, in the type that is exported."""
        return self.weights.read(name, self.dtype)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.Parser(description="A checkpoint -> Hugging Face or Meta Llama.")
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a step folder, RUN/checkpoint/step-00050000")
    add("--output_dir", type=Path, required=True, help="the folder to make")
    add("--format", choices=["hf", "pth", "both"], default="hf", help="default: %(default)s")
    add("--dtype", choices=bridge.DTYPES, default="bfloat16", help="default: %(default)s")
    add("--max_shard_size", type=num_bytes, default=5 * 10**9, metavar="5GB", help="of a safetensors file (default: 5GB)")
    add("--config_file", help="a TOML whose [model] says what a checkpoint of another trainer does not")
    add("--verify", action="store_true", help="load what was written and compare its logits with the checkpoint's")
    add("--copy_to", metavar="URL", help="copy the finished export there through blobfile")
    add("--hf_repo_name", metavar="USER/NAME")
    add("--push_to_hub", action="store_true", help="upload the finished export to --hf_repo_name, private unless --public")
    add("--public", action="store_true", help="make the new repository public, or push to one that is")
    add("--revision", metavar="NAME", help="the branch to push to (default: main)")
    add("--dry_run", action="store_true", help="export, then list what a push would upload, without the network")
    asked = parser.parse_args(arguments)
    if asked.hf_repo_name and not asked.push_to_hub:
        parser.error("--hf_repo_name does nothing without --push_to_hub; give both, or neither")
    if asked.push_to_hub and not asked.hf_repo_name:
        parser.error("--push_to_hub needs --hf_repo_name USER/NAME")
    for name in ("public", "revision", "dry_run"):
        if getattr(asked, name) and not asked.push_to_hub:
            parser.error(f"--{name} does nothing without --push_to_hub")
    return asked


def num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), flags=re.I)
    number, unit, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB")
    return size


def main(asked: argparse.Namespace):
    formats = ("hf", "pth") if asked.format == "both" else (asked.format,)
    if asked.verify and "hf" in formats:
        agreement.need_transformers()
    if asked.copy_to:
        hub.need_blobfile()
    if asked.push_to_hub:
        hub.check_name(asked.hf_repo_name)
    if not (asked.input_dir / ".metadata").exists() and any((asked.input_dir / name).exists() for name in WEIGHTS_OF_OTHERS):
        raise ValueError(f"{asked.input_dir} is no checkpoint, but holds Llama weights; llama_to_dcp.py makes one of them")
    world = distributed.start()
    weights = checkpoint.open_weights(asked.input_dir, world=world, check=False)
    model_json = model_of(weights, asked)
    architecture = models.restore(model_json["family"], model_json["architecture"])
    check_tensors(weights, model_json["family"], architecture)
    export = Export(
        weights=weights, model_json=model_json, architecture=architecture, dtype=bridge.DTYPES[asked.dtype], formats=formats
    )
    files = write(export, asked)
    distributed.stop()
    if asked.copy_to:
        with blaming_the_network():
            hub.copy_to(asked.output_dir, [*files, MANIFEST], asked.copy_to, say=print)
    if asked.push_to_hub:
        push(export, files, asked)


@contextmanager
def blaming_the_network():
    """A RuntimeError becomes one that the user can mend as much as we can."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(error) from error


def model_of(weights: checkpoint.Weights, asked) -> dict:
    """Family, flavor and numbers: of the checkpoint, or of a TOML where it does not know its own."""
    if aside := checkpoint.left_aside(weights.index):
        print(f"left aside: {aside}")
    stored = weights.document("model.json")
    if not isinstance(stored, dict) or not stored.keys() >= {"family", "architecture"}:
        stored = None  # of another trainer
    if stored and not asked.config_file:
        return stored
    if not asked.config_file:
        raise ValueError(
            f"{asked.input_dir} has no model.json of torchtitan_bio, and shapes alone do not tell the number of heads or "
            "rope_theta; name a TOML whose [model] says them: --config_file train_configs/primate_8B.toml"
        )
    config = config_loader.load(["--job.config_file", asked.config_file]).config
    architecture = models.resolve(config.model.name, config.model.flavor, config.model.overrides)
    given = {"family": config.model.name, "flavor": config.model.flavor, "architecture": dataclasses.asdict(architecture)}
    if stored:
        differing = [
            f"{key} is {stored['architecture'].get(key, 'absent')} there and {value} here"
            for key, value in given["architecture"].items()
            if stored["architecture"].get(key, "absent") != value
        ]
        if differing:
            path = asked.input_dir / "model.json"
            raise ValueError(
                f"{path} contradicts --config_file {asked.config_file}: {', '.join(differing)}; leave the TOML out"
            )
    return given


def check_tensors(weights: checkpoint.Weights, family: str, architecture):
    wanted = bridge.shapes_of(family, architecture)
    found = {name: tuple(entry["shape"]) for name, entry in weights.tensors.items()}
    lost = [name for name in convert.OF_THE_VOCABULARY if name in wanted and name not in found]
    if lost and len(found) == len(wanted) - len(lost):
        raise ValueError(f"{weights.path} has no {' and no '.join(lost)}: convert it with llama_to_dcp.py --vocab keep")
    bridge.check_shapes(weights.path, found, wanted)


def write(export: Export, asked) -> dict[str, dict]:
    """The export, whole and verified under its name; its files with size and sha256. One that is there already is taken."""
    folder, identity = asked.output_dir, identity_of(export, asked)
    if (files := files_of(folder, identity, card_text(export, asked))) is not None:
        print(f"{folder} holds this export already, as it was written")
        if asked.verify:
            verify(folder, export)
        return files
    bridge.refuse_existing(folder, asked.input_dir)
    staging = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    started = time.monotonic()
    try:
        # The input is hashed beside its export, which has no name before every byte of it is known to be as it was written.
        with ThreadPoolExecutor(1) as aside:
            checked = aside.submit(export.weights.check)
            try:
                files = fill(staging, export, asked)
            finally:  # damage is told as such, whatever came of it
                checked.result()
        seconds = time.monotonic() - started
        if asked.verify:
            verify(staging, export)
        write_manifest(staging, identity, files, our_card=files[CARD])
        os.rename(staging, folder)
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        raise ValueError(f"{folder} was not written: {error}; {free:,} bytes are free there") from error
    finally:  # where nothing failed, there is no such folder any more
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(entry["bytes"] for entry in files.values())
    print(f"{folder}: {len(files)} files, {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")
    return files


def identity_of(export: Export, asked) -> dict:
    """What makes two exports the same: the checkpoint by its manifest, or all that can be known unread, and the options."""
    folder = export.weights.path
    of = hashlib.sha256((folder / (MANIFEST if export.weights.manifest else ".metadata")).read_bytes())
    if not export.weights.manifest:  # the index of another step of the same run may be the same
        of.update(repr(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())).encode())
    return {
        "of": of.hexdigest(),
        "model": export.model_json,
        "formats": list(export.formats),
        "dtype": asked.dtype,
        "max_shard_size": asked.max_shard_size,
    }


def files_of(folder: Path, identity: dict, new_card: str) -> dict[str, dict] | None:
    """The files of an export that is there, is this very one and is as it was written.

    But for its card: one that a person has edited stays theirs, and any other becomes the new one.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = bridge.read_json(folder / MANIFEST)
    if manifest.get("export") != identity:
        return None
    found = checkpoint.fingerprint([folder / name for name in manifest["files"] if (folder / name).is_file()])
    changed = [
        name for name, entry in manifest["files"].items() if found.get(name) != entry and (name != CARD or name not in found)
    ]
    if changed:
        raise ValueError(f"{folder} has changed since it was exported: {', '.join(changed)}; delete it and export again")
    our_card = manifest.get("card")
    if found[CARD] != our_card:
        print(f"{folder / CARD} has been edited and goes out as it is")
    elif (folder / CARD).read_text() != new_card:
        write_whole(folder / CARD, new_card)
        found |= checkpoint.fingerprint([folder / CARD])
        our_card = found[CARD]
    if found != manifest["files"]:
        write_manifest(folder, identity, found, our_card)
    return found


def write_manifest(folder: Path, identity: dict, files: dict[str, dict], our_card: dict):
    """our_card: what the card was as we wrote it, by which one that was edited is known."""
    content = {"format": 1, "export": identity, "card": our_card, "files": files}
    write_whole(folder / MANIFEST, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str):
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.rename(new, path)


def fill(folder: Path, export: Export, asked) -> dict[str, dict]:
    """Everything but the manifest."""
    numbers, shapes = export.model_json["architecture"], bridge.shapes_of(export.model_json["family"], export.architecture)
    state = export.weights.document("train_state.json")
    converted = export.weights.document("converted.json") or {}
    carried = converted.get("config", {}) if converted.get("from") == "Hugging Face" else {}
    entries = {name: (shape, export.dtype) for name, shape in shapes.items()}
    head_dim, files = export.architecture.head_dim, {}
    size = sum(torch.empty(shape, dtype=export.dtype, device="meta").nbytes for shape in shapes.values())
    if "pth" in export.formats:  # which may refuse, and had better do so at once
        write_json(folder / "params.json", convert.params_of(numbers))
    with bridge.progress(size * len(export.formats), "exporting") as advance:
        if "hf" in export.formats:
            ours = {convert.hf_name(name): name for name in entries}
            files |= weight_files.write_safetensors(
                folder,
                {convert.hf_name(name): entry for name, entry in entries.items()},
                lambda name: convert.to_hf(ours[name], export.read(ours[name]), head_dim),
                max_shard_bytes=asked.max_shard_size,
                progress=advance,
            )
            context = state["config"]["training"]["seq_len"] if state else numbers["rope_original_context"]
            config = convert.hf_config(numbers, dtype=asked.dtype, context=context, carried=carried)
            write_json(folder / "config.json", config)
            write_json(folder / "generation_config.json", {"do_sample": True, **tokens_of(config)})
        if "pth" in export.formats:
            if export.architecture.tie_embeddings:  # Meta's layout has both
                entries["output.weight"] = entries["tok_embeddings.weight"]
            tied = {"output.weight": "tok_embeddings.weight"} if export.architecture.tie_embeddings else {}
            name = "consolidated.00.pth"
            files[name] = weight_files.write_pth(
                folder / name, entries, lambda name: export.read(tied.get(name, name)), progress=advance
            )
    (folder / CARD).write_text(card_text(export, asked))
    if contract := card.token_contract(export.model_json, state, export.weights.document("data.json")):
        write_json(folder / "spikes.json", contract)
    return files | checkpoint.fingerprint(sorted(path for path in folder.iterdir() if path.name not in files))


def tokens_of(config: dict) -> dict:
    return {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}


def card_text(export: Export, asked) -> str:
    state, run = export.weights.document("train_state.json"), run_folder_of(export.weights.path)
    return card.card(
        repo=asked.hf_repo_name,
        model_json=export.model_json,
        num_parameters=sum(torch.Size(entry["shape"]).numel() for entry in export.weights.tensors.values()),
        dtype=asked.dtype,
        step=state and state["step"],
        train_state=state,
        data=export.weights.document("data.json"),
        validation=last_validation(run, state),
        ladder=read_if_there(run, "ladder.json"),
        versions={"torch": torch.__version__, "torchtitan_bio": torchtitan_bio.__version__},
        formats=list(export.formats),
    )


def run_folder_of(step_folder: Path) -> Path | None:
    path = step_folder.resolve().parent
    return path.parent if path.name == "checkpoint" else None


def last_validation(run: Path | None, state: dict | None) -> dict | None:
    """The scores at this very step, as the run wrote them down."""
    if run is None or state is None or not (run / "metrics.jsonl").exists():
        return None
    found = None
    for text in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # half a line, of a run that was killed
            continue
        if line.get("kind") == "validation" and line.get("step") == state["step"]:
            found = line
    return found


def read_if_there(folder: Path | None, name: str) -> dict | None:
    return bridge.read_json(folder / name) if folder and (folder / name).exists() else None


def verify(folder: Path, export: Export):
    family, vocab_size = export.model_json["family"], export.architecture.vocab_size
    wanted = agreement.ours(family, export.architecture, export.read)
    if "hf" in export.formats:
        for line in agreement.check(wanted, agreement.of_transformers(folder), vocab_size):
            print(f"verified with transformers: {line}")
    if "pth" in export.formats:
        again = weight_files.open_meta(folder, lambda name: None)
        params = bridge.read_json(folder / "params.json")
        numbers = convert.numbers_of_params(params, again.tensors["tok_embeddings.weight"].shape[0])
        architecture = dataclasses.replace(export.architecture, **numbers, tie_embeddings=False)
        for line in agreement.check(wanted, agreement.ours(family, architecture, again.read), vocab_size):
            print(f"verified consolidated.00.pth: {line}")


def push(export: Export, files: dict[str, dict], asked):
    state = export.weights.document("train_state.json")
    tag = f"step-{state['step']:08d}" if state else None
    names = [*files, MANIFEST]
    settings = {"public": asked.public, "revision": asked.revision, "tag": tag}
    if asked.dry_run:
        print(*hub.plan_push(asked.output_dir, names, asked.hf_repo_name, **settings), sep="\n")
        return
    message = f"Weights of step {state['step']}" if state else "Weights"
    with blaming_the_network():
        url = hub.push(asked.output_dir, names, asked.hf_repo_name, **settings, message=message, say=print)
    print(f"pushed to {url}")


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    ASKED = parse(sys.argv[1:])
    sys.exit(bridge.run(lambda: main(ASKED)))
