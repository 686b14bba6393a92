"""python jobs/train.py jobs/finetune.yaml [key=value ...]
ray job submit --working-dir . -- python jobs/train.py jobs/finetune.yaml

`bert-ray train` as a file, for schedulers that start files. bert_ray must be installed where it runs; `bert-ray
submit` brings it along.
"""

import sys

from bert_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
