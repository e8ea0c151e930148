import pytest

from expressive_attention.study.files import write_atomically


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
