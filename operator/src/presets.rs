//! Profiles that are there from the start.
//!
//! Owns: reading them from GoGrid's ConfigMap, or taking the built-in ones. Must not: touch a profile that exists.

use crate::apply::{Executor, StepError};
use gogrid_api::{ResourceProfile, profile};
use serde::Deserialize as _;

/// ConfigMap in GoGrid's namespace.
pub(crate) const CONFIG_MAP: &str = "gogrid-presets";
/// Its key: ResourceProfiles, one YAML document each.
pub(crate) const KEY: &str = "presets.yaml";

/// The ConfigMap's text can't be used.
#[derive(Debug, thiserror::Error)]
#[error("document {number} of presets.yaml is no ResourceProfile")]
pub(crate) struct PresetError {
    number: usize,
    #[source]
    source: serde_yaml::Error,
}

/// The profiles to create when absent.
fn read(text: Option<&str>) -> Result<Vec<ResourceProfile>, PresetError> {
    let Some(text) = text else {
        return Ok(profile::presets()
            .into_iter()
            .map(|(name, spec)| ResourceProfile::new(name, spec))
            .collect());
    };
    let mut profiles = vec![];
    for (number, document) in (1..).zip(serde_yaml::Deserializer::from_str(text)) {
        let error = |source| PresetError { number, source };
        let profile = Option::<ResourceProfile>::deserialize(document).map_err(error)?;
        profiles.extend(profile);
    }
    Ok(profiles)
}

/// Creates those that are absent. A list that can't be read creates none and keeps nobody from leading.
pub(crate) async fn create_absent(executor: &Executor) -> Result<(), StepError> {
    match read(executor.presets_text().await?.as_deref()) {
        Ok(profiles) => executor.create_absent_profiles(profiles).await,
        Err(error) => {
            tracing::error!(error = crate::error_text(&error), "presets are not created");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_config_map_the_built_in_presets_are_used_and_with_one_its_documents() {
        assert_eq!(read(None).unwrap().len(), 3);
        let [(name, spec), ..] = profile::presets();
        let yaml = serde_yaml::to_string(&ResourceProfile::new(name, spec)).unwrap();
        let two = format!("---\n{yaml}---\n{}", yaml.replace("conservative", "mine"));
        let names: Vec<_> = read(Some(&two))
            .unwrap()
            .into_iter()
            .filter_map(|p| p.metadata.name)
            .collect();
        assert_eq!(names, ["conservative", "mine"]);
        assert!(read(Some("a: 1")).unwrap_err().to_string().contains("document 1"));
    }
}
