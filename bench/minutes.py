"""bits per byte of texts of 20 kB to 11 MB after 1, 3 and 10 minutes, no options; 35 minutes"""

from matplotlib.figure import Figure

from bench.scripts import command, prepare_data, read_text
from bench.turns import Side, print_table, take_turns

SIZES = (20_000, 100_000, 343_000, 1_000_000, None)  # bytes of --text's beginning, or the library's
MINUTES = (1, 3, 10)


def run(cfg, folder):
    """python train.py --dataset=NAME --minutes=N, whole commands; draws minutes.png, too."""
    given, library = read_text(cfg.text).encode(), read_text(None).encode()
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    rows = [("text", "--minutes", "minutes in all", "bits per byte")]
    for size in SIZES:
        text = given if size and size <= len(given) else library
        name = f"{len(text[:size]):,} bytes"
        file = folder / f"{size}.txt"
        file.write_text(text[:size].decode(errors="ignore"), encoding="utf-8")
        prepare_data(file.stem, file, "bpe", folder)
        points = []
        for minutes in MINUTES:
            words = ["train.py", f"--dataset={file.stem}", f"--data_dir={folder}",
                     f"--minutes={minutes}", "--out_dir=OUT", "--seed=SEED"]
            [[answer]] = take_turns([Side(name, command, (words, folder))], 1)
            points.append((60 / answer["rate"], answer["bits per byte"]))
            rows.append((name, str(minutes), f"{points[-1][0]:.1f}", f"{points[-1][1]:.3f}"))
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    print_table(rows)
    axes.set(xlabel="minutes, whole command", ylabel="bits per byte of the validation split")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig("minutes.png", dpi=110)
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
