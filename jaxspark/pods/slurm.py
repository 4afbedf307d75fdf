"""A batch script for Slurm: one task per GPU, which is how JAX divides a node there.

Partition, account and time limit differ from site to site: `sbatch --partition=...`.
Before the time limit Slurm sends SIGTERM to the tasks; a job that fails goes back into
the queue under the same number and finds its checkpoint.
"""

import shlex

from jaxspark.pods.options import PodOptions


def slurm_script(options: PodOptions) -> str:
    """The script, for an accelerator that is so many GPUs."""
    machines = options.machines()
    command = options.words()
    if machines.hosts * machines.chips_per_host > 1:
        command.append("--distributed=auto")
    settings = {
        "job-name": options.name,
        "output": "%x-%j.log",
        # The log of a job that starts anew goes on.
        "open-mode": "append",
        "nodes": machines.hosts,
        "ntasks-per-node": machines.chips_per_host,
        "gpus-per-node": machines.chips_per_host,
        "mem": 0,
        "signal": f"TERM@{options.grace_seconds}",
    }
    return "\n".join(
        (
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" for name, value in settings.items()),
            "#SBATCH --exclusive",
            "#SBATCH --requeue",
            "",
            *(
                f"export {name}={shlex.quote(value)}"
                for name, value in options.variables().items()
            ),
            "# A task sees all cores and GPUs of its node; JAX takes one GPU of them.",
            "srun --label --kill-on-bad-exit=1 --cpu-bind=none \\",
            f"  {shlex.join(command)}",
            "status=$?",
            f'if [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt '
            f"{options.most_restarts()} ]; then",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        )
    )
