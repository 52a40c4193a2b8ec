"""What may stand on the line of ``kempnerforge launch``."""

from __future__ import annotations

import argparse
import sys

from shared_config.commands.lines.arguments import add_backend, add_config, positive

HELP = "print a SLURM batch script that trains on several machines"
EXAMPLES = ("kempnerforge launch llama3_8b --backend torch --slurm --nodes 4 --gpus-per-node 8 > job.sh",)
SECONDS_TO_SAVE = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--slurm", action="store_true", required=True, help="the scheduler: SLURM, the only one known")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="of each machine (default: 8)")
    parser.add_argument("--cpus-per-gpu", type=positive, default=8, metavar="N", help="cores (default: 8)")
    parser.add_argument("--time", default="24:00:00", metavar="D-HH:MM:SS", help="limit (default: 24:00:00)")
    parser.add_argument("--partition", metavar="NAME", help="where to run (default: the cluster's own)")
    parser.add_argument("--account", metavar="NAME", help="who pays for it")
    parser.add_argument("--job-name", metavar="NAME", help="(default: kempnerforge)", default="kempnerforge")
    parser.add_argument("--output", metavar="DIR", help="folder of the run, the same as --checkpoint.dir")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the processes; may be repeated"
    )
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter (default: this one)")
    parser.add_argument(
        "--seconds-to-save",
        type=positive,
        default=SECONDS_TO_SAVE,
        metavar="N",
        help=f"before the limit, when the run is asked to stop and write a checkpoint (default: {SECONDS_TO_SAVE})",
    )
