# csrc/module.cpp. Addresses are those of tensors' data (0: none), streams are CUDA's handles.

version: str

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(isa: str) -> None: ...
def facts() -> dict[str, str]: ...
def forked() -> None: ...
def cuda_built() -> bool: ...
def cuda_probe() -> str: ...  # if it was

class Pack:
    def __init__(
        self,
        *,
        batch: int,
        part: int,
        channels: int,
        plane: int,
        triplets: int,
        sample_offset: int,
        eps: float,
        step_size: float,
        radius: float,
        clamp: bool,
        low: float,
        high: float,
        norm: int,
        first: int,
        points: int,
        alpha: int,
        start: bool,
        project: bool,
        normalise: bool,
        x_last: bool,
        given_last: bool,
        points_last: bool,
        x_type: int,
        given_type: int,
        points_type: int,
    ) -> None: ...
    def pack_cpu(
        self, x: int, given: int, alpha_in: int, seed: int, statistics: int, points: int, alpha: int, threads: int, /
    ) -> None: ...
    def pack_cuda(
        self, x: int, given: int, alpha_in: int, seed: int, statistics: int, points: int, alpha: int, stream: int, /
    ) -> None: ...
    def start_cpu(self, x: int, seed: int, start: int, threads: int, /) -> None: ...
    def start_cuda(self, x: int, seed: int, start: int, stream: int, /) -> None: ...

class Loss:
    def __init__(
        self,
        *,
        losses: int,
        residuals: int,
        first: int,
        part: int,
        triplets: int,
        classes: int,
        stride: int,
        target_stride: int,
        label_smoothing: float,
        points: int,
        penalty: int,
        of_logits: bool,
        type: int,
        adaptive: bool,
        lam_max: float,
        gamma: float,
        sensitivity: float,
        min_history: int,
        window: int,
    ) -> None: ...
    def forward_cpu(
        self,
        logits: int,
        target: int,
        alpha: int,
        saved: int,
        lam: int,
        lam_value: float,
        lam_state: int,
        count: int,
        skipped: int,
        mean: int,
        spread: int,
        loss: int,
        ce: int,
        e_lin: int,
        threads: int,
        /,
    ) -> None: ...
    def forward_cuda(
        self,
        logits: int,
        target: int,
        alpha: int,
        saved: int,
        lam: int,
        lam_value: float,
        lam_state: int,
        count: int,
        skipped: int,
        mean: int,
        spread: int,
        loss: int,
        ce: int,
        e_lin: int,
        stream: int,
        /,
    ) -> None: ...
    def backward_cpu(
        self,
        logits: int,
        target: int,
        alpha: int,
        saved: int,
        grad_loss: int,
        grad_ce: int,
        grad_e_lin: int,
        grad: int,
        threads: int,
        /,
    ) -> None: ...
    def backward_cuda(
        self,
        logits: int,
        target: int,
        alpha: int,
        saved: int,
        grad_loss: int,
        grad_ce: int,
        grad_e_lin: int,
        grad: int,
        stream: int,
        /,
    ) -> None: ...

class Lam:
    def __init__(self, *, lam_max: float, gamma: float, sensitivity: float, min_history: int, window: int) -> None: ...
    def update_cpu(
        self,
        e_lin: int,
        is_double: bool,
        lam: int,
        count: int,
        skipped: int,
        mean: int,
        spread: int,
        used: int,
        /,
    ) -> None: ...
    def update_cuda(
        self,
        e_lin: int,
        is_double: bool,
        lam: int,
        count: int,
        skipped: int,
        mean: int,
        spread: int,
        used: int,
        stream: int,
        /,
    ) -> None: ...
