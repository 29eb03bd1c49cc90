"""Two towers, one for the patch and one for the counts, that meet on a sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainer.config import LossConfig, ModelConfig, OptimConfig
from trainer.expression import ExpressionHead
from trainer.genes import GeneInput, GeneMLP
from trainer.graph import GraphFusion, NeighborGraph
from trainer.heads import projection
from trainer.loss import PairLoss
from trainer.means import NamedGene
from trainer.rank import RankTransformer
from trainer.towers import ImageTower


@dataclass(frozen=True, slots=True)
class Embedded:
    """A batch through the model; None where its input or its term of the loss is absent."""

    z_image_BD: torch.Tensor | None  # float32, of unit length
    z_gene_BD: torch.Tensor | None  # float32, of unit length
    image_expression_B: torch.Tensor | None  # loss of the expression predicted from the patch
    masked_genes_B: torch.Tensor | None  # loss of the masked genes predicted from the others


class PairModel(nn.Module):
    """The towers, the neighbour graph and the heads that a config asks for, and `pair_loss`.

    Raises BadInput where the config names no network that can be built.
    """

    def __init__(self, n_genes: int, n_species: int, config: ModelConfig, loss: LossConfig) -> None:
        super().__init__()
        self.image = ImageTower(config)
        self.gene: GeneMLP | RankTransformer = (
            GeneMLP(n_genes, config)
            if config.rank is None
            else RankTransformer(n_genes, n_species, config.rank)
        )
        n_image, n_gene = self.image.n_features, self.gene.n_features
        self.graph = self.fusion = None
        if config.graph is not None:
            self.graph = NeighborGraph(n_genes, n_gene, config.graph)
            self.fusion = GraphFusion(n_gene, config.graph)
        self.image_projection = projection(n_image, config)
        self.gene_projection = projection(n_gene, config)
        self.pair_loss = PairLoss(loss)
        self.image_expression = self.masked_genes = None
        if loss.image_expression > 0:
            self.image_expression = ExpressionHead(n_image, n_genes, loss.expression_family)
        if loss.masked_genes > 0:
            self.masked_genes = ExpressionHead(n_gene, n_genes, loss.expression_family)

    def fit(self, counts_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take what counts are normalised by from a sample of training cells."""
        self.gene.fit(counts_SG, measured_SG)
        if self.graph is not None:
            self.graph.fit(counts_SG, measured_SG)

    def set_means(self, genes: Sequence[NamedGene], path: Path) -> int:
        """Take the technology means of `model.rank.means` over fitted ones; how many it lacks."""
        assert isinstance(self.gene, RankTransformer), "only ranks are taken by means"
        return self.gene.set_means(genes, path)

    def forward(
        self,
        image_BCHW: torch.Tensor | None,
        genes: GeneInput | None,
        masked_BG: torch.Tensor | None = None,
    ) -> Embedded:
        """Embeddings, and the loss of each row for each prediction that the config asks for.

        `image_BCHW` is RGB in 0 … 1. The genes of `masked_BG` (bool) are unmeasured to the gene
        encoder, in the cell and in its neighbours; of them, those that are measured are predicted.
        The embedding too is that of what is left.
        """
        z_image_BD = z_gene_BD = image_expression_B = masked_genes_B = None
        if image_BCHW is not None:
            image_BF = self.image(image_BCHW)
            z_image_BD = _on_sphere(self.image_projection(image_BF))
            if self.image_expression is not None and genes is not None:
                measured_BG = genes.measured_BG > 0
                image_expression_B = self.image_expression(
                    image_BF, genes.counts_BG * measured_BG, measured_BG, measured_BG
                )
        if genes is not None:
            gene_BF = self._gene_features(genes if masked_BG is None else _left(genes, masked_BG))
            z_gene_BD = _on_sphere(self.gene_projection(gene_BF))
            if self.masked_genes is not None and masked_BG is not None:
                measured_BG = genes.measured_BG > 0
                masked_genes_B = self.masked_genes(
                    gene_BF, genes.counts_BG * measured_BG, measured_BG, masked_BG & measured_BG
                )
        return Embedded(z_image_BD, z_gene_BD, image_expression_B, masked_genes_B)

    def embed_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) of unit length, float32."""
        return _on_sphere(self.image_projection(self.image(image_BCHW)))

    def embed_counts(self, genes: GeneInput) -> torch.Tensor:
        """(B, D) of unit length, float32."""
        return _on_sphere(self.gene_projection(self._gene_features(genes)))

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimiser; `lr_scale` of each is what the schedule's rate is times.

        Vectors and scalars (biases, norms, the temperature) are not pulled to zero.
        """
        of_image = {id(p) for p in self.image.parameters()}
        groups = []
        for in_image, lr_scale in ((True, optim.image_lr_scale), (False, 1.0)):
            for is_matrix, weight_decay in ((True, optim.weight_decay), (False, 0.0)):
                parameters = [
                    p
                    for p in self.parameters()
                    if (id(p) in of_image) == in_image and (p.ndim >= 2) == is_matrix
                ]
                groups.append(
                    {"params": parameters, "weight_decay": weight_decay, "lr_scale": lr_scale}
                )
        return groups

    def _gene_features(self, genes: GeneInput) -> torch.Tensor:
        cell_BF: torch.Tensor = self.gene(genes.counts_BG, genes.measured_BG, genes.species_B)
        if self.graph is None or self.fusion is None:
            return cell_BF
        if genes.neighbor_counts_BKG is None or genes.present_BK is None:
            raise ValueError("a model with a graph takes neighbours, if only none of each cell")
        graph_BF = self.graph(
            genes.counts_BG, genes.measured_BG, genes.neighbor_counts_BKG, genes.present_BK
        )
        fused_BF: torch.Tensor = self.fusion(cell_BF, graph_BF)
        return fused_BF


def _left(genes: GeneInput, masked_BG: torch.Tensor) -> GeneInput:
    return replace(genes, measured_BG=genes.measured_BG * ~masked_BG)


def _on_sphere(z_BD: torch.Tensor) -> torch.Tensor:
    return functional.normalize(z_BD.float(), dim=1)
