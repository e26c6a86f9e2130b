from pd_proxy_simulator.blocks import BlockPool


def test_a_pool_gives_out_all_but_the_null_block() -> None:
    pool = BlockPool(5, caching=True)
    taken = pool.take([], 4)
    assert taken is not None
    assert [block.index for block in taken] == [1, 2, 3, 4]
    assert pool.take([], 1) is None
    pool.release(taken)
    assert (pool.used, pool.free) == (0, 4)


def test_a_freed_block_can_be_hit_until_it_is_given_to_another_request() -> None:
    pool = BlockPool(3, caching=True)
    taken = pool.take([], 1)
    assert taken is not None
    pool.write(taken[0], 7, [1, 2], 0, key=99)
    pool.release(taken)
    assert pool.match([99]) == taken
    assert pool.take([], 2) is not None
    assert pool.match([99]) == []


def test_hits_on_free_blocks_reduce_the_number_of_free_blocks() -> None:
    pool = BlockPool(3, caching=True)
    taken = pool.take([], 1)
    assert taken is not None
    pool.write(taken[0], 7, [1, 2], 0, key=99)
    pool.release(taken)
    assert pool.take(pool.match([99]), 2) is None
    assert pool.used == 0


def test_a_pinned_block_reads_right_and_a_freed_one_wrong_unless_memory_is_asked_for() -> None:
    pool = BlockPool(3, caching=True)
    taken = pool.take([], 1)
    assert taken is not None
    pool.write(taken[0], 7, [1, 2], 0, None)
    pool.pin(taken)
    assert pool.pinned == 1
    assert pool.read(1, scrambled_when_free=True) == (7, [1, 2], 0)
    pool.unpin(taken)
    pool.release(taken)
    assert pool.read(1, scrambled_when_free=True)[2] != 0
    assert pool.read(1, scrambled_when_free=False) == (7, [1, 2], 0)
    pool.take([], 2)
    assert pool.read(1, scrambled_when_free=False)[2] != 0
