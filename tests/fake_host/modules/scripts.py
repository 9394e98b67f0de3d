AlwaysVisible = object()


class Script:
    """What an extension's script class has; the methods are those that Forge Neo calls, in its order."""

    def title(self):
        raise NotImplementedError

    def show(self, is_img2img):
        return True

    def after_extra_networks_activate(self, p, *args, **kwargs):
        pass

    def process_before_every_sampling(self, p, *args, **kwargs):
        pass

    def postprocess_batch(self, p, *args, **kwargs):
        pass
