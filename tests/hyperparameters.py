"""The table of keys in docs/hyperparameters.md: ``python -m tests.hyperparameters`` writes it anew."""

import json

from configs.schema import CONFIG_DIR, Config, DiffuseConfig
from utils.legal import describe

PAGE = CONFIG_DIR.parent / "docs" / "hyperparameters.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
RELEASED = ("shapes", "traffic_img", "obj3d128_img", "balls", "obj3d", "obj3d128", "traffic", "clevrer", "phyre")


def tables():
    """The tables as lines of Markdown, between the two marks."""
    files = {name: json.loads((CONFIG_DIR / f"{name}.json").read_text()) for name in RELEASED}
    published = set(Config.FIRST.split()) - {"ds", "root"}
    lines = ["## DLPv2 and DDLP", "", "| key | meaning | legal | default | released values |", "|---|---|---|---|---|"]
    for name, entry in Config.keys().items():
        values = {}
        for ds, config in files.items():
            if name in published and name in config:
                values.setdefault(json.dumps(config[name]), []).append(ds)
        lines.append(f"| `{name}` | {_cells(entry)} | {_released(values)} |")
    lines += ["", "## DiffuseDDLP", "", "| key | meaning | legal | default |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {_cells(entry)} |" for name, entry in DiffuseConfig.keys().items()]
    return lines


def _cells(entry):
    default = "must be given" if not _has_default(entry) else f"`{json.dumps(entry.default)}`"
    return " | ".join(text.replace("|", "\\|") for text in (entry.metadata["meaning"], describe(entry), default))


def _has_default(entry):
    return type(entry.default).__name__ != "_MISSING_TYPE"


def _released(values):
    if len(values) == 1 and sum(map(len, values.values())) == len(RELEASED):
        return f"`{next(iter(values))}`"
    return "; ".join(f"`{value}`: {', '.join(names)}" for value, names in values.items())


def main():
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, *tables(), END + after]))


if __name__ == "__main__":
    main()
