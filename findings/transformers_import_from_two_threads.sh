#!/usr/bin/env bash
# transformers 5.19.0: two threads that import a name from it at the same time; one gets ImportError.
#
# `from transformers import AutoTokenizer` in two threads of a process where transformers is not imported yet: the lazy
# module is in sys.modules before it can resolve names, and the second thread is told that there is no such name.
#
# Seen: ImportError: cannot import name 'AutoTokenizer' from 'transformers', in every one of 5 processes.
# Expected: Python's import lock makes the second thread wait, as for any other module.
# Why it matters: servers that load several models at their start do it in threads. A kept failure is an outage that only a
# restart clears, and only perhaps. Import once, before there are threads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.19.0 tokenizers==0.23.3
venv/bin/python - <<'EOF'
import subprocess, sys

code = """
import threading
failed = []
def load():
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        failed.append(str(error))
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*failed)
"""
answers = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() for _ in range(5)]
failed = [answer for answer in answers if "cannot import name 'AutoTokenizer'" in answer]
print(len(failed), "of 5 processes:", failed[:1])
sys.exit(0 if failed else 1)
EOF
