//! AdamW over plain slices, so that its moments can be saved and its decay changed in the middle of a run.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::ops::with_slice;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.98;
const EPSILON: f32 = 1e-8;

pub struct AdamW {
    /// First and second moments of every variable.
    pub moments: Vec<(Vec<f32>, Vec<f32>)>,
}

impl AdamW {
    pub fn new(vars: &[Var]) -> Self {
        let zeros = |var: &Var| vec![0.0; var.elem_count()];
        Self {
            moments: vars.iter().map(|var| (zeros(var), zeros(var))).collect(),
        }
    }

    /// One update; `step` counts from 1.
    pub fn step(
        &mut self,
        vars: &[Var],
        grads: &GradStore,
        step: usize,
        rate: f64,
        decay: f64,
    ) -> Result<()> {
        let scale = (rate / (1.0 - f64::from(BETA_1).powi(step as i32))) as f32;
        let correction = (1.0 / (1.0 - f64::from(BETA_2).powi(step as i32))) as f32;
        for (var, (first, second)) in vars.iter().zip(&mut self.moments) {
            // Decay is for matrices; norms are scales around 1.
            let keep = if var.rank() == 1 {
                1.0
            } else {
                (1.0 - rate * decay) as f32
            };
            let grad = grads
                .get(var.as_tensor())
                .context("every weight has a gradient")?;
            let updated = with_slice(var.as_tensor(), |old| {
                with_slice(grad, |grad| {
                    let mut new = old.to_vec();
                    const PART: usize = 16_384;
                    new.par_chunks_mut(PART)
                        .zip(grad.par_chunks(PART))
                        .zip(first.par_chunks_mut(PART).zip(second.par_chunks_mut(PART)))
                        .for_each(|((new, grad), (first, second))| {
                            for i in 0..new.len() {
                                first[i] = BETA_1 * first[i] + (1.0 - BETA_1) * grad[i];
                                second[i] = BETA_2 * second[i] + (1.0 - BETA_2) * grad[i] * grad[i];
                                let spread = (second[i] * correction).sqrt() + EPSILON;
                                new[i] = new[i] * keep - scale * first[i] / spread;
                            }
                        });
                    Ok(new)
                })
            })?;
            var.set(&Tensor::from_vec(updated, var.shape(), var.device())?)?;
        }
        Ok(())
    }
}
