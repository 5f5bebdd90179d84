"""A result of benchmarks/throughput.py as a table and as a plot."""

from PIL import Image, ImageDraw, ImageFont


def heading(result: dict) -> str:
    mode = f"{result['mode']}, compiled" if result["compiled"] else result["mode"]
    return f"{result['model']}, {mode}, {result['dtype']}, batch {result['batch']}"


def table(result: dict) -> str:
    peers = " and ".join(result["peers"]) or "all candidates, since no peer ran"
    took = ", ".join(f"{name} in {count}" for name, count in result.get("auto_took", {}).items())
    auto = f" Of the kinds of call that auto tried it took {took}." if took else ""
    lines = [
        f"# {heading(result)}",
        "",
        f"{result['machine']}; {result['versions']}; {result['date']}; {result['rounds']} interleaved rounds. Measured "
        f"in this run: products of {result['flops'] / 1e12:.2f} TFLOP/s, copies of "
        f"{result['bytes_per_second'] / 1e9:.0f} GB/s.{auto}",
        "",
        f"| candidate | images/s (median) | times the fastest of {peers} | quartiles | peak memory, MiB "
        "| share of products | share of copies |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row['candidate']} | {row['images_per_second']:.1f} | {row['ratio_to_best_peer']:.3f} "
            f"| {low:.3f} to {high:.3f} | {peak} | {row['share_of_products']:.0%} "
            f"| {row['share_of_copies']:.0%} |"
        )
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines) + "\n"


LEFT, RIGHT, TOP, ROW, WIDTH = 170, 190, 84, 22, 900  # pixels


def plot(result: dict) -> Image.Image:
    """Bars of the speed relative to the fastest peer, with quartiles."""
    rows = result["rows"]
    image = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 16), "white")
    draw, font, large = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(17)
    highest = max(row["ratio_quartiles"][1] for row in rows)

    def at(ratio: float) -> float:
        return LEFT + min(ratio / highest, 1.0) * (WIDTH - LEFT - RIGHT)

    draw.text((12, 10), f"{heading(result)}: times the fastest peer", "black", large)
    draw.text((12, 36), f"{result['machine']}, {result['date']}; {result['rounds']} rounds", "#666", font)
    for place, row in enumerate(rows):
        y, (low, high) = TOP + ROW * place, row["ratio_quartiles"]
        color = "#2a6f97" if row["candidate"].startswith("ours") else "#b5651d"
        draw.text((LEFT - 8, y + ROW / 2), row["candidate"], "black", font, anchor="rm")
        draw.rectangle((LEFT, y + 3, at(row["ratio_to_best_peer"]), y + ROW - 4), color)
        draw.line((at(low), y + ROW / 2, at(high), y + ROW / 2), "black", 1)
        label = f"{row['ratio_to_best_peer']:.2f}   {row['images_per_second']:.0f} images/s"
        draw.text((at(high) + 8, y + ROW / 2), label, "black", font, anchor="lm")
    draw.line((at(1), TOP - 6, at(1), image.height - 12), "#000")
    draw.text((at(1), TOP - 8), "1", "#666", font, anchor="mb")
    return image
