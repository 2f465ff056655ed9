"""A small project in FlashCore's place: the files that a deployment runs on the host, fast and made to fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

SETUP = """\
import os, sys
from pathlib import Path

home = Path.home()
with (home / "setups").open("a") as file:
    file.write("made\\n")
if (home / "setup-fails").exists():
    print("set-up: needs a C compiler", file=sys.stderr)
    sys.exit(1)
python = Path(sys.argv[1]) / "bin" / "python"
python.parent.mkdir(parents=True, exist_ok=True)
python.unlink(missing_ok=True)
python.write_text(f'#!/bin/sh\\nexec {sys.executable} "$@"\\n')
python.chmod(0o755)
"""

VALIDATE = """\
import json, os, sys, time
from pathlib import Path

home = Path.home()
with (home / "validations").open("a") as file:
    file.write("started\\n")
print("scenario 1 of 5", flush=True)
while (home / "hold").exists():
    time.sleep(0.02)
(output,) = [Path(word.partition("=")[2]) for word in sys.argv if word.startswith("--output=")]
verdict = (home / "verdict").read_text() if (home / "verdict").exists() else "0"
if verdict != "2":
    report = {"arguments": sys.argv[1:], "environment": dict(os.environ)}
    (output / "report.json").write_text(json.dumps(report))
    (output / "report.html").write_text("<p>report</p>")
print("passed" if verdict == "0" else "scenario 2 differs at token 7 hf_abcdefghijklm")
sys.exit(int(verdict))
"""

SMOKE = """\
import sys
from pathlib import Path

with (Path.home() / "smokes").open("a") as file:
    file.write(sys.argv[1] + "\\n")
print("attention agrees on " + sys.argv[1])
"""

HUB_ACCESS = """\
import sys

found = {"open/model": (0, "open model"), "gated/model": (3, "gated model, not logged in")}
status, words = found.get(sys.argv[1], (5, "no such model"))
print(words)
sys.exit(status)
"""

FILES = {
    "pyproject.toml": '[project]\nname = "stand-in"\n',
    'odd name\'s $HOME "file".txt': "odd\n",
    "scripts/setup_env.py": SETUP,
    "flashcore_ops/__init__.py": "",
    "flashcore_ops/__main__.py": VALIDATE,
    "flashcore_ops/deployment/__init__.py": "",
    "flashcore_ops/deployment/on_host/__init__.py": "",
    "flashcore_ops/deployment/on_host/smoke.py": SMOKE,
    "flashcore_ops/deployment/on_host/hub_access.py": HUB_ACCESS,
    # Known to git, and copied all the same never.
    ".env": "HF_TOKEN=hf_secret_in_dotenv\n",
    "deploy.pem": "hf_secret_in_pem\n",
}


def make_project(root: Path) -> Path:
    """Writes the project's files into `root` and tells git of them, then one that git is not told of."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for arguments in (["init", "--quiet"], ["add", "--force", "."]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    (root / "untracked.txt").write_text("hf_secret_untracked\n")
    return root
