"""python -m marval.evidence [DOCUMENT.md ...]: fill the documents and write docs/evidence.md, from results/ here."""

import sys
from pathlib import Path

from marval.evidence.documents import DOCUMENT, fill_markdown, write_evidence

root = Path.cwd()
for name in sys.argv[1:]:
    print(f"{name}: {'filled' if fill_markdown(root / name, root) else 'unchanged'}")
print(f"{DOCUMENT}: {'written' if write_evidence(root) else 'unchanged'}")
