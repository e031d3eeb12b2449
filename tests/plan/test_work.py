"""What single instructions do."""

from plan import programs

from jaxinfra.plan import program, work


def test_of_an_array_that_is_sliced_or_updated_in_place_the_slice_alone_moves():
    read = program.parse(programs.SLICES)
    moved = lambda name: work.moved_bytes(read, "main", read.by_name("main")[name])
    slice_bytes, number = 4 * 8 * 4, 4
    # What is sliced, its index, and the result; what is put, and where it goes.
    assert moved("taken") == slice_bytes + number + slice_bytes
    assert moved("put") == slice_bytes + number + slice_bytes
    assert moved("all") == 2 * 100 * slice_bytes
