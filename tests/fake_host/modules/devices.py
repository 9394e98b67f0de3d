def torch_gc():
    pass
