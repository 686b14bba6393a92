"""python -m bert_ray annotate jobs/annotate.yaml

The command `bert-ray` without its script; `bert-ray submit` also sends this file to a cluster as the job's entry point.
"""

import sys

from bert_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
