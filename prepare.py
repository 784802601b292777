"""Recordings made ready for training: what is in them, a fast store of them, their division into train and test.

python prepare.py inspect mydata/ more/*.nwb --out outputs/inventory   # anything that data.source takes, and NWB
python prepare.py spikes one.nwb two.nwb --bin-width 0.02 --out outputs/mylab      # NWB, npz, Parquet, Arrow, a hub name
python prepare.py split outputs/mylab --by session --test 0.1
./train.sh train_configs/quickstart.toml --job.dump_folder outputs/run --data.source outputs/mylab

`spikes` that was stopped goes on when the same command is given again.
Exit status: 0 done, 2 something is to be mended in what was asked or in the data, 1 any other failure, 130 interrupted.
"""

import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from torchtitan_bio import __version__, command_line, exits
from torchtitan_bio.config import ConfigError
from torchtitan_bio.data import conversion, rows, sources, store, summary
from torchtitan_bio.data.selection import number_of
from torchtitan_bio.science import inventory

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
MOST_LINES = 20  # of what was not as it should be; all are in provenance.json


def read_flags(argv: list[str]):
    parser = command_line.Parser(prog="prepare.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    spikes = commands.add_parser("spikes", help="make a store of recordings, which training reads fastest")
    spikes.add_argument("sources", nargs="+", metavar="SOURCE", help="an NWB, npz, Parquet or Arrow file, a folder, a hub name")
    spikes.add_argument("--out", required=True, help="the store's folder: new, or begun by the same command")
    spikes.add_argument("--source-dataset", help="of recordings whose file names none (default for NWB: the name of --out)")
    spikes.add_argument(
        "--order",
        default="given",
        help="of neurons: given, rate (the most active first, by the first row of each session), original (as before any "
        "reordering of a store), or a file with the numbers 0 to n-1 (default: given)",
    )
    spikes.add_argument(
        "--shard-size", default="1G", type=num_bytes, help="of the store's files, about: 512M, 4G (default: 1G)"
    )
    inspect = commands.add_parser("inspect", help="say what is in recordings")
    inspect.add_argument("sources", nargs="+", metavar="SOURCE", help="anything that data.source takes, or NWB")
    inspect.add_argument("--out", help="a folder for inventory.json and inventory.png")
    for command in (spikes, inspect):
        command.add_argument(
            "--bin-width",
            type=float,
            help="seconds: into which NWB's spike times are counted (default: 0.02), or of counts what is known of them",
        )
        command.add_argument("--interval", default="", help="a row for each entry of this table of NWB's, such as trials")
    split = commands.add_parser("split", help="divide a store into train and test, by a hash")
    split.add_argument("store", help="a folder that `prepare.py spikes` made")
    split.add_argument("--by", required=True, choices=("session", "subject", "row"), help="what is never on both sides")
    split.add_argument("--test", type=float, default=0.1, help="share of all sessions, subjects or rows (default: 0.1)")
    split.add_argument("--validation", type=float, default=0.0, help="share of a third split (default: 0)")
    return parser.parse_args(argv)


def num_bytes(text: str) -> int:
    """512M is 512 * 2**20."""
    scale = UNITS.get(text[-1:].upper(), 1)
    number = float(text[:-1] if scale > 1 else text)
    if not 1 <= number * scale < 2**60:
        raise ValueError
    return int(number * scale)


def main(flags):
    with exits.blaming_the_input():
        {"spikes": make_store, "inspect": inspect, "split": split}[flags.command](flags)


def check_once(files):
    """Refuse a file that was named twice: its rows would be there twice."""
    seen = set()
    for file in files:
        place = (file.split, file.name if file.bytes_file is None else file.bytes_file.resolve())
        if place in seen:
            raise ConfigError(f"{file.name} is among the sources twice, and its rows would be too; name it once")
        seen.add(place)


def make_store(flags):
    out, width = Path(flags.out), flags.bin_width
    check_width(width)
    for source in flags.sources:
        if Path(source).is_dir() and Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise ConfigError(f"--out={out} lies in {source}, and would be taken for a part of it; name a folder elsewhere")
    files = [file for source in flags.sources for file in rows.find(source)]
    check_once(files)
    check_meant(flags, files)
    if generated := [file for file in files if file.bytes_file is None]:
        raise ConfigError(f"{generated[0].source} makes its rows when they are read; there is nothing to prepare")
    settings = conversion.Settings(
        # Counts beside NWB files do not get their default, which nobody claimed of them.
        bin_width_s=width or (rows.DEFAULT_BIN_WIDTH_S if all(file.is_nwb for file in files) else None),
        interval=flags.interval,
        source_dataset=flags.source_dataset or (out.resolve().name if any(file.is_nwb for file in files) else ""),
        order=flags.order,
        shard_bytes=flags.shard_size,
    )
    is_finished = (out / sources.STORE_INDEX).exists()
    with Progress(files, flags.interval) as progress:
        made = conversion.convert(files, out, settings, made_by=f"torchtitan_bio {__version__}", tell=progress)
    for line in problems(made):
        print(line)
    state = "is finished already" if is_finished else f"made in {progress.seconds:.1f} s, {progress.rate()}"
    print(f"{out}: {number_of(made['rows'], 'row')}, {number_of(made['counts'], 'count')}, {state}")
    malformed = sum(len(file["malformed"]) for file in made["files"])
    if malformed == made["rows"]:
        print("none of its rows can be read, and nothing can be trained on it: mend them, and make it anew in another folder")
        return
    bound = f" --data.max_malformed_rows {malformed}" if malformed else ""
    print(f"train on it with --data.source {out}{bound}; look at it with prepare.py inspect {out}")


def problems(made: dict) -> list[str]:
    """What was not as it should be, by file."""
    lines = []
    for file in made["files"]:
        lines += [f"{file['file']}: {note}" for note in file["notes"]]
        lines += [f"{file['file']}: malformed, and stored as such: {name or 'a row'}: {why}" for name, why in file["malformed"]]
        if file["clipped"]:
            lines.append(f"{file['file']}: {number_of(file['clipped'], 'count')} above {made['clipped_to']}, stored as that")
    rest = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"... and {rest:,} more such lines in provenance.json"] if rest > 0 else [])


def inspect(flags):
    check_width(flags.bin_width)
    if flags.out and Path(flags.out).exists() and not Path(flags.out).is_dir():
        raise ConfigError(f"--out={flags.out} is a file; name a folder")
    parts, found, notes = [rows.find(source) for source in flags.sources], inventory.Inventory(), []
    files = [file for part in parts for file in part]
    check_once(files)
    check_meant(flags, files)
    if flags.out:
        sources.make_folder(flags.out)
    names = names_of(flags.sources)
    with Progress(files, flags.interval) as progress:
        for source, name, part in zip(flags.sources, names, parts, strict=True):
            where = f"{name}: " if len(names) > 1 else ""
            for file in part:
                read, of_file = rows.read(file, bin_width_s=flags.bin_width, interval=flags.interval)
                notes += [f"{where}{file.name}: {note}" for note in of_file]
                for row in read:
                    found.add(row, name)
                    progress({"n": row.n, "t": row.t})
            notes += [f"{where}{path.name} is not read: {reason}" for path, reason in sources.skipped_files(source)]
    result = {"asked": names, **found.result(), "notes": notes}
    print(*inventory.table(result), *inventory.findings(result), *notes[:MOST_LINES], sep="\n")
    if len(notes) > MOST_LINES:
        print(
            f"... and {len(notes) - MOST_LINES:,} more such lines"
            + (" in inventory.json" if flags.out else "; --out keeps all")
        )
    if flags.out:
        folder = Path(flags.out)
        (folder / "inventory.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        title = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        inventory.draw(result, found.raster, title).save(folder / "inventory.png")
        print(f"written: {folder / 'inventory.json'}, {folder / 'inventory.png'}")


def names_of(asked: list[str]) -> list[str]:
    """What each source may be called before anyone; those of one name are numbered."""
    names = [summary.public_name(source) or "recordings" for source in asked]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})" for place, name in enumerate(names)
    ]


def split(flags):
    test, validation = flags.test, flags.validation
    if not (0 < test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise ConfigError(f"--test={test} and --validation={validation} must be shares that leave something for train")
    table = store.divide(flags.store, flags.by, test=test, validation=validation)
    lines = list(zip(*(table[name].to_pylist() for name in ("split", "subject_id", "session_id", "n", "t")), strict=True))
    for name in sorted({line[0] for line in lines}, key=("train", "validation", "test").index):
        mine = [line for line in lines if line[0] == name]
        sizes = {
            "subject": len({line[1] for line in mine}),
            "session": len({line[1:3] for line in mine}),
            "row": len(mine),
            "count": sum(n * t for *_, n, t in mine),
        }
        print(f"{name}: {', '.join(number_of(size, noun) for noun, size in sizes.items())}")
    if shared := shared_sessions(lines):
        print(f"of {number_of(shared, 'session')} there are rows on several sides: scores say little of new sessions")
    print("written into the store's index; training reads it as data.split and validation.split (data.split_by=given)")


def shared_sessions(lines) -> int:
    """How many sessions have rows in several splits."""
    sides = {}
    for name, subject, session, *_ in lines:
        sides.setdefault((subject, session), set()).add(name)
    return sum(len(names) > 1 for names in sides.values())


def check_width(width):
    if width is not None and not 0 < width < float("inf"):
        raise ConfigError(f"--bin-width={width} must be a positive number of seconds")


def check_meant(flags, files):
    """Refuse what would change nothing: counts are not binned again, nor cut at intervals."""
    for file in files:
        if flags.interval and not file.is_nwb:
            raise ConfigError(
                f"--interval={flags.interval}: {file.name} holds counts and no intervals; leave it out, or name NWB"
            )
        if flags.bin_width and isinstance(file.path, store.Store):
            known = set(file.path.rows(["bin_width_s"])["bin_width_s"].to_pylist()) - {None, flags.bin_width}
            if known:
                raise ConfigError(
                    f"--bin-width={flags.bin_width}: the store {file.name} has bins of {min(known)} s, and counts are not "
                    "binned again; leave it out, or prepare another store of the files with spike times"
                )


class Progress:
    """A bar of rows with counts a second; called with each row."""

    def __init__(self, files, interval):
        from tqdm import tqdm

        total = sum(rows.count(file, interval) for file in files)
        # In a log file a bar is a line each time: one in ten seconds is enough.
        self.bar = tqdm(total=total, unit=" rows", mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True)
        self.started, self.counts, self.seconds = time.perf_counter(), 0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.started
        self.bar.leave = self.bar.n > 0
        self.bar.close()

    def __call__(self, row):
        self.counts += row["n"] * row["t"]
        self.seconds = time.perf_counter() - self.started
        self.bar.set_postfix_str(self.rate(), refresh=False)
        self.bar.update()

    def rate(self) -> str:
        return f"{self.counts / max(self.seconds, 1e-9) / 1e6:,.1f} M counts/s"


if __name__ == "__main__":
    FLAGS = read_flags(sys.argv[1:])
    sys.exit(exits.run(lambda: main(FLAGS), "this command"))
