//! What is generated from code is what is committed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

mod crds;

use gogrid_reference::compare;
use gogrid_tests::{chart, rbac, values};
use serde_json::json;

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

#[tokio::test]
async fn every_right_that_the_chart_grants_names_its_code_and_its_test_and_no_other_is_granted() {
    let values = json!({});
    let mut documents = chart::rendered(&values).await.unwrap().to_vec();
    let test = chart::render_test(chart::RELEASE, "gogrid-system", &values).await;
    documents.extend(chart::documents(&test.unwrap()).unwrap());
    let granted = rbac::granted(&documents, "gogrid-system").unwrap();
    let listed = rbac::listed();
    let (unknown, idle): (Vec<_>, Vec<_>) = (
        granted.difference(&listed).collect(),
        listed.difference(&granted).collect(),
    );
    assert!(
        unknown.is_empty() && idle.is_empty(),
        "granted but not in the table: {unknown:#?}; in the table but not granted: {idle:#?}"
    );
    for grant in rbac::GRANTS {
        for (file, function) in grant.places() {
            let text = std::fs::read_to_string(gogrid_reference::root().join(file)).unwrap();
            assert!(
                text.contains(&format!("fn {function}(")),
                "{file} has no {function}"
            );
        }
    }
    compare("docs/reference/rbac.md", &rbac::page());
}
