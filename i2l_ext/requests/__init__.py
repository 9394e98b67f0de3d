"""What a user can ask for: one frozen request for each thing, with fields, defaults, ranges and help in one place.

Command line, tab, HTTP, ComfyUI and the engine's messages are doors to these requests; ``i2l_ext.operations`` has a
function for each. Standard library and ``converters`` only.
"""

from i2l_ext.requests.crops import CENTRE, Square, parse_crop
from i2l_ext.requests.draw import DrawRequest
from i2l_ext.requests.fields import Field, FieldInfo, Request, bad_request
from i2l_ext.requests.library import DiscardRequest, LibraryRequest
from i2l_ext.requests.lora_files import (
    ADVICE,
    CheckRequest,
    ConvertRequest,
    ExportRequest,
    InspectRequest,
    MergeRequest,
    RankCurveRequest,
    RankRequest,
    RepairRequest,
    weighted_file,
)
from i2l_ext.requests.make import DTYPES, BatchRequest, MakeRequest, PreviewRequest
from i2l_ext.requests.models import (
    PACK_FORMS,
    CacheRequest,
    DownloadRequest,
    ModelsRequest,
    PackRequest,
    SetupPlanRequest,
    SetupRequest,
    TrustRequest,
    VerifyRequest,
)
from i2l_ext.requests.system import PRECISIONS, DoctorRequest, EngineOptions, parse_size
from i2l_ext.requests.training_run import RunRequest

PROTOCOL = 2
"""Version of the messages between a page's process and the engine's. Raise it when a message changes its meaning."""

REQUESTS: dict[str, type[Request]] = {
    request.kind: request
    for request in (
        MakeRequest,
        BatchRequest,
        PreviewRequest,
        DrawRequest,
        InspectRequest,
        CheckRequest,
        RankCurveRequest,
        ConvertRequest,
        RankRequest,
        MergeRequest,
        ExportRequest,
        RepairRequest,
        LibraryRequest,
        DiscardRequest,
        ModelsRequest,
        DownloadRequest,
        PackRequest,
        TrustRequest,
        SetupPlanRequest,
        SetupRequest,
        VerifyRequest,
        CacheRequest,
        DoctorRequest,
        RunRequest,
    )
}
"""By kind."""

__all__ = [
    "ADVICE",
    "CENTRE",
    "DTYPES",
    "PACK_FORMS",
    "PRECISIONS",
    "PROTOCOL",
    "REQUESTS",
    "BatchRequest",
    "CacheRequest",
    "CheckRequest",
    "ConvertRequest",
    "DiscardRequest",
    "DoctorRequest",
    "DownloadRequest",
    "DrawRequest",
    "EngineOptions",
    "ExportRequest",
    "Field",
    "FieldInfo",
    "InspectRequest",
    "LibraryRequest",
    "MakeRequest",
    "MergeRequest",
    "ModelsRequest",
    "PackRequest",
    "PreviewRequest",
    "RankCurveRequest",
    "RankRequest",
    "RepairRequest",
    "Request",
    "RunRequest",
    "SetupPlanRequest",
    "SetupRequest",
    "Square",
    "TrustRequest",
    "VerifyRequest",
    "bad_request",
    "parse_crop",
    "parse_size",
    "weighted_file",
]
