//! What is generated from code is what is committed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

mod crds;

use gogrid_reference::compare;
use gogrid_tests::values;

#[test]
fn the_charts_values_and_their_schema_and_page_are_what_the_types_say() {
    compare("charts/gogrid/values.yaml", &values::yaml().unwrap());
    compare("charts/gogrid/values.schema.json", &values::schema().unwrap());
    compare("docs/reference/values.md", &values::page().unwrap());
}

#[test]
fn every_field_of_the_api_has_its_row_on_a_page() {
    for crd in gogrid_api::crds() {
        let file = format!("docs/reference/{}.md", crd.spec.names.kind.to_lowercase());
        let page = crds::page(&crd);
        let undescribed: Vec<&str> = page.lines().filter(|line| line.ends_with("|  |")).collect();
        assert!(undescribed.is_empty(), "{file}: {undescribed:#?}");
        compare(&file, &page);
    }
}
