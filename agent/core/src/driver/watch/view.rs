//! What is known, as the rest of the agent is told it.
//!
//! Owns: the translation of readings into devices, and the bounds of what a broken library may have scribbled over.

use super::super::{DriverState, Identity, Load, Reading, Trouble, View};
use super::{Known, Watch};
use crate::results::clip;
use crate::session::Nanos;
use gogrid_api::node::{Backend, Device, Health};
use gogrid_api::{ByteQuantity, Bytes};
use std::collections::BTreeMap;

impl Watch {
    pub(super) fn view(&self) -> View {
        let lost = self.known.iter().filter_map(|k| {
            let trouble = k.trouble.as_ref().filter(|t| t.lost)?;
            Some((k.identity.uuid.clone(), trouble.message.clone()))
        });
        let load = |(reading, at): &(Reading, Nanos), foreign: Option<u64>| Load {
            at: *at,
            busy_percent: reading.busy_percent.map(|p| p.min(100)),
            foreign_busy_percent: reading.foreign_busy_percent.map(|p| p.min(100)),
            celsius: reading.celsius,
            throttle: reading.throttle,
            used: Bytes(reading.used),
            foreign: foreign.map(Bytes),
        };
        let answering = matches!(self.state, DriverState::Answering { .. });
        let loads = self.known.iter().filter(|_| answering).filter_map(|k| {
            let reading = k.reading.as_ref()?;
            Some((k.identity.uuid.clone(), load(reading, k.foreign)))
        });
        View {
            state: self.state.clone(),
            devices: self.known.iter().map(|k| self.device(k)).collect(),
            loads: loads.collect::<BTreeMap<_, _>>(),
            lost: lost.collect(),
            places: self
                .known
                .iter()
                .map(|k| (k.identity.uuid.clone(), (k.index, k.mig)))
                .collect(),
            gone_since: self.gone_since,
            kernel: false,
        }
    }

    fn device(&self, known: &Known) -> Device {
        let identity = &known.identity;
        let reading = known.reading.as_ref().map(|(r, _)| r);
        let bytes = |figure: Option<u64>| ByteQuantity::from(Bytes(figure.unwrap_or(0)));
        let wrong = match (&self.state, &known.trouble, reading) {
            (DriverState::Unresponsive(_), _, _) => Some("the driver does not answer".to_owned()),
            (DriverState::Released, _, _) => Some("the driver is released, as the Node's label asks".into()),
            (_, Some(trouble), _) => Some(format!("the driver does not answer for it: {}", trouble.message)),
            (_, None, None) => Some("not measured yet".into()),
            (_, None, Some(_)) if identity.unusable.is_some() => identity.unusable.clone(),
            (_, None, Some(_)) if !self.worker => Some("this build has no CUDA worker".into()),
            (_, None, Some(_)) => None,
        };
        Device {
            uuid: identity.uuid.clone(),
            name: identity.name.clone(),
            backend: Backend::Cuda,
            memory_total: bytes(reading.map(|r| r.total)),
            memory_reserved: bytes(reading.map(|r| r.reserved)),
            memory_foreign: bytes(reading.map(|r| known.foreign.unwrap_or(r.used))),
            memory_free: bytes(reading.map(|r| r.free)),
            compute_capability: identity
                .capability
                .map(|(major, minor)| format!("{major}.{minor}")),
            health: if wrong.is_some() {
                Health::Unhealthy
            } else {
                Health::Healthy
            },
            message: wrong.map(|text| clip(&text, 256).to_owned()),
            holder: None,
        }
    }
}

/// What the probe says is cut to what the API takes: a driver's library may have scribbled over it.
pub(super) fn bounded(trouble: &Trouble) -> Trouble {
    Trouble {
        lost: trouble.lost,
        message: clip(&trouble.message, 200).to_owned(),
    }
}

pub(super) fn bounded_identity(identity: Identity) -> Identity {
    Identity {
        uuid: clip(&identity.uuid, 96).to_owned(),
        name: clip(&identity.name, 128).to_owned(),
        capability: identity
            .capability
            .filter(|(major, minor)| *major < 1000 && *minor < 1000),
        unusable: identity.unusable.map(|text| clip(&text, 256).to_owned()),
    }
}
