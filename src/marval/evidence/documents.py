"""README and model cards filled with tables and claims, and `docs/evidence.md`: every claim and how to repeat it."""

import re
from collections.abc import Sequence
from pathlib import Path

from marval.evaluate.compare import KINDS
from marval.evaluate.results import Row, markdown, read_results
from marval.evaluate.tables import bench_table, markdown_table, plan_table, rewards_table, speedup_table
from marval.evidence.claims import CLAIMS, Claim, listed
from marval.io.files import write_text

DOCUMENT = "docs/evidence.md"
TABLES = {
    "results": markdown_table,
    "speed": speedup_table,
    "bench": bench_table,
    "rewards": rewards_table,
    "plan": plan_table,
}
MARK = re.compile(rf"<!-- ({'|'.join(TABLES)}|claim): (\S+) -->(.*?)<!-- end -->", re.DOTALL)

HEAD = """# Evidence

Every claim of README that was measured, with its figures, their spread and how to repeat them. Generated from
`results/` by `make tables`: do not edit. The spread is the smallest and largest over seeds of the samples, or over
rounds of timing (the slower model's fastest round over the faster one's slowest, and the reverse). The weights are
those of one training each, but for the three tunings.
"""


def fill_markdown(document: Path, root: Path) -> bool:
    """Fill every `<!-- KIND: FILE -->` (or `<!-- claim: NAME -->`) ... `<!-- end -->`; True if the document changed.

    Kinds are those of `TABLES`. A claim that says what it should is left as it is, so that its lines may be broken by
    hand.

    Raises:
        ValueError: a claim that there is not, or a results file that is missing.
    """
    text = document.read_text()
    claims = {claim.name: claim for claim in CLAIMS}

    def filled(match: re.Match[str]) -> str:
        kind, name, old = match[1], match[2], match[3]
        if kind == "claim":
            if name not in claims:
                raise ValueError(f"{document} has an unknown claim {name}: expected one of {', '.join(claims)}")
            new = claims[name].text(root)
            return match[0] if plain(old) == new else f"<!-- claim: {name} -->{new}<!-- end -->"
        if not (root / name).is_file():
            raise ValueError(f"{document} shows {name}, which is not there: write it with --out {name}")
        return f"<!-- {kind}: {name} -->\n{TABLES[kind](root / name)}\n<!-- end -->"

    return _replace(document, MARK.sub(filled, text))


def plain(text: str) -> str:
    """Text of Markdown without comments and line breaks."""
    return " ".join(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split())


def evidence(root: Path) -> str:
    """The whole document. What was not measured says so, and by which command it would be."""
    return "\n".join([HEAD, *(_section(claim, root) for claim in CLAIMS)])


def write_evidence(root: Path) -> bool:
    """Write the document; True if it changed."""
    return _replace(root / DOCUMENT, evidence(root))


def _replace(file: Path, text: str) -> bool:
    if file.is_file() and file.read_text() == text:
        return False
    write_text(file, text)
    return True


def _section(claim: Claim, root: Path) -> str:
    if not (root / claim.file).is_file():
        return f"## {claim.title}\n\n- Not measured yet.\n- Measure it: {_shell(claim.commands)}\n"
    parts = [f"## {claim.title}", ""]
    if claim.sentence is not None:
        parts += [f"> {claim.text(root)}.", ""]
    rows = [(m.label, f"{m.value:.4g}", m.spread) for m in claim.measured(root)]
    parts += [markdown(("figure", "value", "spread"), rows), ""]
    for part in claim.parts:
        parts += _provenance(root, claim.file, part)
    return "\n".join([*parts, f"- Again: {_shell(again(claim))}", ""])


def again(claim: Claim) -> list[str]:
    """The commands that measure anew beside the results, whose rows would be taken as done, and compare."""
    commands = [re.sub(r"\b(results|docs)/", "again/", command) for command in claim.commands]
    if not set(KINDS).isdisjoint(claim.parts):
        commands.append(f"marval compare {claim.file} {claim.file.replace('results/', 'again/')}")
    return commands


def _shell(commands: Sequence[str]) -> str:
    return ", then ".join(f"`{command}`" for command in commands)


def _provenance(root: Path, file: str, part: str) -> list[str]:
    """What made a part of a results file: commands, commits, seeds, processes; and the models' hashes."""
    content = read_results(root / file)[part]
    rows = content["rows"]
    made = [row.get("made", content) for row in rows]
    devices = sorted({one.get("device", one.get("machine", "device not recorded")) for one in made})
    torches = sorted({one.get("versions", content).get("torch", "?") for one in made})
    seeds = sorted({str(row.get("seed", content.get("seed", 0))) for row in rows})
    names = sorted({f"{row['model']} ({row['sha256'][:12]})" for row in rows if "sha256" in row and "model" in row})
    models = f"; models {listed(names)}" if names else ""
    return [
        f"- From `{file}` ({part}): seed {listed(seeds)}, torch {listed(torches)}, "
        f"{listed(sorted({_processes(one, content) for one in made}))}, {listed(devices)}{models}.",
        *(f"- Measured by `{command}`" for command in sorted({one["command"] for one in made})),
        f"- At commit {listed(sorted({_short(one['commit']) for one in made}))}.",
    ]


def _processes(made: Row, content: Row) -> str:
    """How many processes of how many threads; of an older row what its part says of the command that wrote it last."""
    if "processes" not in made:
        of_part = made["command"] == content["command"] and "threads" in content
        return f"{content['threads']} threads" if of_part else "processes not recorded"
    processes, threads = made["processes"], made["threads"]
    some = "1 process" if processes == 1 else f"{processes} processes"
    return f"{some} of {'1 thread' if threads == 1 else f'{threads} threads'}"


def _short(commit: str) -> str:
    digest, _, dirty = commit.partition("-")
    return f"{digest[:12]}-{dirty}" if dirty else digest[:12]
