"""Every shipped config as text, so that a change of one shows in review.

    python -m tests.golden_configs            # name what differs
    python -m tests.golden_configs --update   # write tests/golden/configs/*.txt anew

A changed default shows in all of them, which is the point: say why in the commit.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from test_config import SHIPPED

from memoryformer import config as config_lib
from memoryformer.training import banner

FOLDER = pathlib.Path(__file__).parent / "golden" / "configs"


def expected() -> dict[str, str]:
    """Return {file name: text} of every shipped config and argument."""
    texts = {}
    for path in SHIPPED:
        file, _, argument = path.partition(":")
        stem = pathlib.Path(file).stem
        name = f"{stem}-{argument}.txt" if argument else f"{stem}.txt"
        texts[name] = banner.dump(config_lib.load(path))
    return texts


def stale() -> list[str]:
    """Return the files that are missing, superfluous or not what the configs say."""
    texts = expected()
    there = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.txt")}
    names = sorted(texts.keys() | there.keys())
    return [name for name in names if texts.get(name) != there.get(name)]


def update() -> None:
    """Write the files anew."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.txt"):
        path.unlink()
    for name, text in expected().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    changed = stale()
    if "--update" in sys.argv:
        update()
    print("\n".join(changed) or "all as on file")
    sys.exit("--update" not in sys.argv and bool(changed))
