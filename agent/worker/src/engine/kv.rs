//! Keys and values of every sequence, allocated once. Owns their layout: per layer, slot × head × position × element.
//! Must not know about tokens or batches.

use super::EngineError;
use crate::num::wide;

/// The cache of all layers.
pub(crate) struct KvCache {
    layers: Vec<LayerCache>,
    heads: usize,
    context: usize,
    width: usize,
}

struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    pub(crate) fn new(
        layers: usize,
        slots: usize,
        heads: usize,
        context: usize,
        width: usize,
    ) -> Result<Self, EngineError> {
        let overflow = EngineError::Internal("cache size");
        let size = [slots, heads, context, width]
            .into_iter()
            .try_fold(1_usize, usize::checked_mul)
            .ok_or(overflow)?;
        let mut cache = Self {
            layers: Vec::with_capacity(layers),
            heads,
            context,
            width,
        };
        for _ in 0..layers {
            cache.layers.push(LayerCache {
                keys: zeros(size)?,
                values: zeros(size)?,
            });
        }
        Ok(cache)
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| wide(layer.keys.len() + layer.values.len()).saturating_mul(4))
            .sum()
    }

    /// Positions of one sequence.
    pub(crate) fn context(&self) -> usize {
        self.context
    }

    fn head_start(&self, slot: usize, head: usize) -> usize {
        (slot * self.heads + head) * self.context * self.width
    }

    /// Stores the keys and values of one position, all heads.
    pub(crate) fn store(
        &mut self,
        layer: usize,
        slot: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), EngineError> {
        if position >= self.context {
            return Err(EngineError::Internal("position outside the context"));
        }
        for head in 0..self.heads {
            let from = head * self.width..(head + 1) * self.width;
            let start = self.head_start(slot, head) + position * self.width;
            let to = start..start + self.width;
            let outside = || EngineError::Internal("slot outside the cache");
            let layer = self.layers.get_mut(layer).ok_or_else(outside)?;
            let pairs = [(&mut layer.keys, keys), (&mut layer.values, values)];
            for (cache, new) in pairs {
                let to = cache.get_mut(to.clone()).ok_or_else(outside)?;
                to.copy_from_slice(new.get(from.clone()).ok_or_else(outside)?);
            }
        }
        Ok(())
    }

    /// Keys and values of positions `0..count` of one head; empty outside the cache.
    pub(crate) fn head(&self, layer: usize, slot: usize, head: usize, count: usize) -> (&[f32], &[f32]) {
        let start = self.head_start(slot, head);
        let range = start..start + count.min(self.context) * self.width;
        self.layers.get(layer).map_or((&[], &[]), |layer| {
            (
                layer.keys.get(range.clone()).unwrap_or(&[]),
                layer.values.get(range).unwrap_or(&[]),
            )
        })
    }
}

/// Zeroed memory that the kernel commits page by page, or an error instead of an abort.
fn zeros(size: usize) -> Result<Vec<f32>, EngineError> {
    let mut values = Vec::new();
    let bytes = wide(size).saturating_mul(4);
    values
        .try_reserve_exact(size)
        .map_err(|_| EngineError::Allocation {
            what: "key/value cache",
            bytes,
        })?;
    values.resize(size, 0.0);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_one_head_are_contiguous_and_slots_do_not_touch() {
        let mut cache = KvCache::new(1, 2, 2, 3, 2).unwrap();
        cache
            .store(0, 1, 0, &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0])
            .unwrap();
        cache.store(0, 1, 1, &[9.0, 10.0, 11.0, 12.0], &[0.0; 4]).unwrap();
        assert_eq!(cache.head(0, 1, 1, 2).0, &[3.0, 4.0, 11.0, 12.0]);
        assert_eq!(cache.head(0, 1, 0, 1).1, &[5.0, 6.0]);
        assert_eq!(cache.head(0, 0, 1, 3).0, &[0.0; 6]);
        assert_eq!(cache.bytes(), 2 * 4 * 2 * 2 * 3 * 2);
    }

    #[test]
    fn a_position_outside_the_context_is_refused() {
        let mut cache = KvCache::new(1, 1, 1, 3, 2).unwrap();
        assert!(cache.store(0, 0, 3, &[0.0; 2], &[0.0; 2]).is_err());
        assert!(cache.store(0, 1, 0, &[0.0; 2], &[0.0; 2]).is_err());
    }
}
