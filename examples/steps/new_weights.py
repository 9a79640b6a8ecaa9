"""Save an encoder with new weights, of the same architecture and front end as another one.

python -m examples.steps.new_weights FOLDER --like runs/study/seed-0/stage1/model --seed 0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common.files import replacing


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model folder to write")
    parser.add_argument("--like", type=Path, required=True, metavar="MODEL", help="model folder with the architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    model = SSLAMForPreTraining(SSLAMConfig.from_pretrained(arguments.like))
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.folder) as temporary:
        model.save_pretrained(temporary)
        SSLAMFeatureExtractor.from_pretrained(arguments.like).save_pretrained(temporary)


if __name__ == "__main__":
    main()
