"""python jobs/annotate.py jobs/annotate.yaml [key=value ...]
spark-submit --master spark://master:7077 jobs/annotate.py jobs/annotate.yaml engine=spark
ray job submit --working-dir . -- python jobs/annotate.py jobs/annotate.yaml engine=ray

`bert-ray annotate` as a file, for schedulers that start files. bert_ray must be installed where it runs; `bert-ray
submit` brings it along.
"""

import sys

from bert_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["annotate", *sys.argv[1:]]))
