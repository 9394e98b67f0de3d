tabs, settings, started, before_ui = [], [], [], []


def on_ui_tabs(function):
    tabs.append(function)


def on_ui_settings(function):
    settings.append(function)


def on_app_started(function):
    started.append(function)


def on_before_ui(function):
    before_ui.append(function)
