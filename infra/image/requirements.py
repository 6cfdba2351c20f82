"""Prints what pyproject.toml asks for, a requirement a line: the image installs it before it knows the code.

usage: python requirements.py PYPROJECT [EXTRA ...]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
wanted = project["dependencies"] + [one for extra in sys.argv[2:] for one in project["optional-dependencies"][extra]]
print("\n".join(wanted))
