"""Command line: verbs of a few lines each; the work is done by the library.

| module | verbs |
|---|---|
| `application` | none: the application, `main`, and arguments that verbs share |
| `starting` | demo, doctor |
| `studying` | components, plan, init, run, status, extend |
| `attributing` | fit, baseline |
| `judging` | check, evaluate |
| `editing` | edit |
| `exchanging` | import, export |

Verbs are listed by `coar --help` in the order in which these modules are imported.
"""

from coar.cli import starting, studying, attributing, judging, exchanging, editing  # isort: skip
from coar.cli.application import app, main

__all__ = ["app", "attributing", "editing", "exchanging", "judging", "main", "starting", "studying"]
