r"""Draws what `jaxspark evaluate --json_out` measured.

  jaxspark plot --results=dspark.json,dflash.json --out=acceptance.png
  jaxspark plot --results=depth1.json,depth2.json --out=depth.png \
      --x=depth --at=1,2                    accepted length over anything

Without --x it draws conditional acceptance by place.
"""

import json
import pathlib

from absl import flags

from jaxspark.evaluation.plots import plot_acceptance, plot_lines
from jaxspark.launch import program

flags.DEFINE_list("results", None, "Files of jaxspark evaluate.")
flags.DEFINE_list("names", None, "What to call them; by default their file names.")
flags.DEFINE_string("out", None, "PNG file.")
flags.DEFINE_string("x", None, "Draw accepted length by domain over this quantity.")
flags.DEFINE_list("at", None, "Its value for each file.")
flags.DEFINE_string("title", "", "Of the plot.")
flags.mark_flags_as_required(["results", "out"])
FLAGS = flags.FLAGS


def main() -> None:
    """Reads and draws."""
    results = [json.loads(pathlib.Path(path).read_text()) for path in FLAGS.results]
    names = FLAGS.names
    if names is None:
        names = [pathlib.Path(path).stem for path in FLAGS.results]
    for name, given in (("names", names), ("at", FLAGS.at)):
        if given is not None and len(given) != len(results):
            raise ValueError(f"{len(results)} results, but {len(given)} {name}")
        repeated = {each for each in given or () if given.count(each) > 1}
        if repeated:
            raise ValueError(
                f"--{name} must differ, got {', '.join(repeated)} more than once"
            )
    if (FLAGS.x is None) != (FLAGS.at is None):
        raise ValueError("--x needs --at, one value per result, and --at needs --x")
    if FLAGS.x is None:
        curves = {
            name: [
                rate or 0.0 for rate in each["macro_average"]["conditional_acceptance"]
            ]
            for name, each in zip(names, results)
        }
        plot_acceptance(FLAGS.out, curves, title=FLAGS.title)
        return
    values = [float(value) for value in FLAGS.at]
    lines = {
        domain: {
            value: each["domains"][domain]["accepted_length"]
            for value, each in zip(values, results)
        }
        for domain in results[0]["domains"]
    }
    plot_lines(
        FLAGS.out, lines, xlabel=FLAGS.x, ylabel="accepted length", title=FLAGS.title
    )


if __name__ == "__main__":
    program.run(main)
