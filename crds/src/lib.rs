//! The words of GoGrid's API: custom resource types, CEL rules, units, conditions.
