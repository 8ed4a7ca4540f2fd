"""samples.json and samples.md."""

from finetuning.runs.samples import Sample, read_samples, write_samples


def test_samples_are_read_as_they_were_written(tmp_path):
    assert read_samples(tmp_path) == []
    samples = [Sample("首都は？", "a\nb", None), Sample("2 + 3?", "", "5")]
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples
    assert "Before:\n\n    a\n    b\n\nAfter:\n\n    (not yet)\n" in (
        tmp_path / "samples.md"
    ).read_text(encoding="utf-8")
