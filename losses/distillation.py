"""Knowledge distillation."""

import torch.nn.functional as F
from torch import Tensor

from losses.classification import at_least_float32, nll


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float, Lambda: float
) -> Tensor:
    """Lambda T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - Lambda) NLL(student).

    The KL is summed over classes and averaged over the batch; T^2 keeps the size of its gradient
    while T varies. Both logits (B, K), labels (B,) -> scalar. Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network", 2015, Section 2.
    """
    log_student = F.log_softmax(at_least_float32(student_logits) / T, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits) / T, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return Lambda * T**2 * divergence + (1 - Lambda) * nll(student_logits, labels)
