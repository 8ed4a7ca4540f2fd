"""Runs side by side: a table of what was set and what came of it, and a plot of their losses.

python src/compare.py outputs/learning_rates                           # every run folder in it
python src/compare.py outputs/dolly_gpt2 outputs/try outputs/short     # these
python src/compare.py outputs/learning_rates --by chrf                 # the highest first

Prints the settings in which the runs differ, the last figures of each and the scores of its answers
with their intervals, the run with the least evaluation loss first, and mean and standard deviation
of runs that differ in nothing but their seed. --by sorts by another column: a setting, a figure or
a score. Writes comparison.csv, .json and .png to the folder that holds them all, and
comparison.html with the scores and answers too, to look at; one run alone gets its report.html
anew. An unfinished run is compared as far as it is.
"""

from argparse import Namespace

from finetuning.command_line import ArgumentParser
from finetuning.script import run


def main(arguments: list[str]) -> None:
    from finetuning.evaluation.compared_run import common_folder, find_runs
    from finetuning.evaluation.comparison_files import write_comparison
    from finetuning.evaluation.comparison_terminal import print_runs
    from finetuning.evaluation.report import report, write_report
    from finetuning.files import write_text
    from finetuning.runs.terminal import make_console

    options = read_arguments(arguments)
    runs = find_runs(options.folders)
    console, folder = make_console(), common_folder(runs)
    print_runs(console, runs, options.by)
    write_comparison(runs, folder, options.by)
    if len(runs) == 1:
        write_report(runs[0].path)
    write_text(folder / "comparison.html", report(runs))
    console.print(f"written to {folder}: comparison.csv, .json, .png, .html")


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--by")
    return parser.read(arguments)


if __name__ == "__main__":
    run(main, __doc__)
