from tests.convert.surgery import *
def test_x(golden, tmp_path):
    root = copy_of(golden, TORCH, tmp_path)
    with edited(shard(root)) as c:
        c["args"].foo = PLACEHOLDER
    plant(shard(root), reduce(name("os","system"), text("touch /tmp/xx")))
    e = refused(root, tmp_path/"out", mtt_convert.UnsafePickleError)
    print(e)
    root = copy_of(golden, TORCH_DIST, tmp_path/"2")
    with edited_metadata(root) as m: print(m.storage_data and list(m.storage_data.items())[0])
    mtt_convert.convert(root, tmp_path/"out")
