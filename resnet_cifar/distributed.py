"""What the processes of one training share: batches, sums, and the first one's word."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that train together, `size` of them, of which this is the one numbered `rank`; by default it is alone."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> range:
        """This process's places in a batch of `count` images; the shares differ by one at most, the first ones are larger."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def weight(self, count: int) -> float:
        """What makes the mean over processes of weighted means over shares the mean over a batch of `count` images."""
        return len(self.share(count)) * self.size / count

    def take(self, batch: Tensor) -> Tensor:
        """This process's share of a batch, or its first image where there are fewer images than processes.

        That image has the weight 0: no process may stay out of a step, in which the others wait for its gradients.
        """
        own = self.share(len(batch))
        return batch[own.start : own.stop] if own else batch[:1]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, on each of them."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on each of them."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, of which each process brings its share."""
        if self.size == 1:
            return rows
        own, whole = self.share(count), rows.new_zeros(count, *rows.shape[1:])
        whole[own.start : own.stop] = rows[: len(own)]
        return self.sum(whole)

    def wait_for_first(self) -> None:
        """For the others: until the first process has come to where it calls this too."""
        self.from_first(0)

    def from_first(self, number: float) -> float:
        """The first process's number, on each of them; by way of the CPU, so that no accelerator has to wait."""
        if self.size == 1:
            return number
        sent = torch.tensor(number if self.rank == 0 else 0.0, dtype=torch.float64)
        dist.broadcast(sent, src=0)
        return sent.item()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers (batch norm's running statistics), as DDP does before a training step.

        After the last step, and in a moving average, which DDP does not know, each has its own.
        """
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network under DDP, on GPUs with batch norm over the whole batch (SyncBatchNorm cannot be had on a CPU)."""
        if self.size == 1:
            return network
        if next(network.parameters()).is_cuda:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DistributedDataParallel(network)


ALONE = World()
